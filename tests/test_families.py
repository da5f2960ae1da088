"""Every line of the table of families: the base model's own text, and what is refused before anything runs.

A window is shorter than the text, and where layers are of two kinds there is one of each.
"""

from pathlib import Path

import pytest
import tiny_models
import torch
import trainings
import transformers
from drafters import context_speculator, eagle3_speculator, streaming_speculator
from test_drafter_state import SAME, farthest, speculate
from tiny_models import VOCAB, has_sdpa, prompts, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from modeling_speculator import families, transformers_api
from modeling_speculator.families import AROUND_A_TEXT_MODEL, FAMILIES, Family, register_family
from modeling_speculator.measuring.oracle import Oracle
from modeling_speculator.trainers import SpeculatorTrainer


# Those of tiny_models.FAMILIES are what most other tests run on.
HERE = [name for name in FAMILIES if name in CONFIG_MAPPING and name not in tiny_models.FAMILIES]


def tokens_per_step(model, cache=None):
    """Of drafts that are right 7 times in 10, after a prompt and after three with padding; the text stays the same."""
    found = []
    for rows in (1, 3):
        inputs = prompts(rows)
        plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        oracle = Oracle(model, plain, F.pad(inputs["attention_mask"], (0, 24), value=1), p_right=0.7)
        options = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": cache}
        out = model.generate(**inputs, **options, assistant_model=oracle, return_dict_in_generate=True)
        assert out.sequences.tolist() == plain.tolist()
        found.append(out.speculation.tokens_per_step)
    return min(found)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", HERE)
def test_the_text_is_the_models_own(model_type, attention):
    if attention == "sdpa" and not has_sdpa(model_type):
        pytest.skip("transformers has no sdpa for it")
    model = tiny_model(model_type, attention)
    assert tokens_per_step(model) > 1.5
    if attention == "sdpa" or not has_sdpa(model_type):
        assert tokens_per_step(model, "static") > 1.5


@pytest.mark.parametrize("model_type", ["mistral", "ministral3", "phimoe"])
def test_a_wrong_line_is_found(model_type, monkeypatch):
    """As one mask they would differ silently."""
    model = tiny_model(model_type)
    monkeypatch.setitem(FAMILIES, model_type, Family(""))
    with pytest.raises(AssertionError):
        tokens_per_step(model)


def test_most_are_here():
    """But for those that a later release has, or an earlier one had."""
    assert len(HERE) + len(tiny_models.FAMILIES) > 70
    assert tiny_models.FAMILIES.keys() <= FAMILIES.keys()


@pytest.mark.parametrize("model_type", HERE)
def test_two_steps_of_stage_1(model_type, tmp_path):
    args = trainings.arguments(tmp_path, max_steps=2, save_strategy="no", eval_strategy="no", logging_steps=1)
    lengths = {"prompt_length": 4, "generation_length": 8}
    data = trainings.rows(16, 12)
    trainer = SpeculatorTrainer(trainings.speculator(), tiny_model(model_type), args, train_dataset=data, **lengths)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


# Latent keys, products over rows of a whole batch, keys of earlier layers, a norm of another name.
@pytest.mark.parametrize("make", [context_speculator, eagle3_speculator, streaming_speculator])
@pytest.mark.parametrize("model_type", ["deepseek_v3", "opt", "jetmoe", "gemma4_text", "biogpt", "glm4_moe"])
def test_drafters_that_read_texts(model_type, make):
    model = tiny_model(model_type)
    speculator = make(model)
    if make is streaming_speculator and model_type == "gemma4_text":
        with pytest.raises(ValueError, match="have no keys of their own"):
            model.generate(**prompts(), assistant_model=speculator)
        return
    oracle, out = speculate(model, speculator, prompts())
    assert farthest(oracle, out) < SAME


def test_layers_that_pass_on_several_states():
    model = tiny_model("gemma3n_text")
    with pytest.raises(ValueError, match="several states of each token"):
        model.generate(**prompts(), assistant_model=context_speculator(model))
    speculator = context_speculator(model, feature_layers=[])
    oracle, out = speculate(model, speculator, prompts())
    assert farthest(oracle, out) < SAME


TEXT_MODELS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "idefics3": "llama",
    "internvl": "qwen2",
    "llava": "llama",
    "llava_next": "mistral",
    "mistral3": "ministral3",
    "smolvlm": "llama",
}


def wrapped(model_type):
    """A tiny model of a text model and a vision tower."""
    config_class, text = CONFIG_MAPPING[model_type], TEXT_MODELS[model_type]
    changes = {"pad_token_id": 0} if model_type == "gemma4" else {}
    vision = type(config_class().vision_config)
    known = {name for part in vision.__mro__ for name in getattr(part, "__annotations__", {})}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14, "projection_dim": 16}
    sizes = {name: size for name, size in sizes.items() if name in known}
    if model_type == "internvl":
        sizes |= {"image_size": [28, 28], "patch_size": [14, 14]}
    text_config = tiny_config(text, FAMILIES[text].masks, **changes)
    torch.manual_seed(0)
    config = config_class(text_config=text_config, vision_config=vision(**sizes))
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.25)
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("model_type", AROUND_A_TEXT_MODEL)
def test_text_of_a_model_with_a_vision_tower(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this release has no such model")
    assert tokens_per_step(wrapped(model_type)) > 1.5


REFUSED = {
    "deepseek_v32": "an indexer picks",
    "deepseek_v4": "compressed keys",
    "falcon_mamba": "with one token at a time",
    "glm_moe_dsa": "an indexer picks",
    "jamba": "with one token at a time",
    "kimi_linear": "recurrent state",
    "mamba2": "recurrent state",
    "llama4_text": "within chunks of the text",
    "qwen2_vl": "several rows",
    "qwen2_5_vl": "several rows",
    "qwen3_vl": "several rows",
    "gpt_neo": "by their order in the cache",
    "bloom": "ALiBi",
    "mpt": "ALiBi",
    "xglm": "it is not known",
    "ctrl": "it is not known",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_before_anything_runs(model_type):
    """Models without weights, which could not run."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this release has no such model")
    auto = AutoModelForImageTextToText if model_type.endswith("_vl") else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(CONFIG_MAPPING[model_type]())
    oracle = Oracle(tiny_model("llama", one_layer_of_each_kind=True), prompts(1)["input_ids"])
    with pytest.raises(ValueError, match=f"Speculation is not supported for .*{REFUSED[model_type]}"):
        model.generate(torch.ones(1, 4, dtype=torch.long), assistant_model=oracle)


def test_falcon_with_alibi_is_refused():
    model = tiny_model("falcon")
    model.config.alibi = True
    with pytest.raises(ValueError, match="ALiBi positions"):
        model.generate(**prompts(1), assistant_model=Oracle(model, prompts(1)["input_ids"]))


def test_register_family(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", FAMILIES.copy())
    register_family("my_type", "window")
    assert families.FAMILIES["my_type"] == Family("", "window")
    register_family("my_type", like="gpt2")
    assert families.FAMILIES["my_type"] == Family("", "one", has_position_table=True, embeds_token_types=True)
    with pytest.raises(ValueError, match="`masks` must be one of 'one', 'window', 'layer types', but is 'two'"):
        register_family("my_type", "two")
    with pytest.raises(ValueError, match="`like='gpt9'` is no family"):
        register_family("my_type", like="gpt9")


def test_a_registered_family_is_served():
    """A model of somebody's own, under a name that nobody knows."""
    model = tiny_model("mistral")
    model.config.model_type = "mine"
    with pytest.raises(ValueError, match="it is not known"):
        tokens_per_step(model)
    try:
        register_family("mine", "window", like="llama")
        assert tokens_per_step(model) > 1.5
    finally:
        del FAMILIES["mine"]
    assert model.config.vocab_size == VOCAB


PAGE = (Path(__file__).parents[1] / "docs/families.md").read_text()


def rows_of(page, heading):
    """Of the table with a heading: what each row's first cells say."""
    table = page.split(heading, 1)[1].split("\n\n", 1)[0].strip().splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def test_the_page_of_families():
    expected = []
    for name, family in FAMILIES.items():
        shown = f"**{name}**" if name in tiny_models.FAMILIES else name
        kernels = "sdpa, eager" if name not in CONFIG_MAPPING or has_sdpa(name) else "eager"
        expected.append([shown, family.checkpoint, family.masks, kernels])
    found = rows_of(PAGE, "| model type | a checkpoint | masks | kernels |")
    if not transformers.__version__.startswith(transformers_api.NEWEST):  # in earlier ones some have no sdpa
        found, expected = ([row[:3] for row in rows] for rows in (found, expected))
    assert sorted(found) == sorted(expected)
    around = rows_of(PAGE, "| model type | a checkpoint |\n")
    assert around == [[name, checkpoint] for name, checkpoint in AROUND_A_TEXT_MODEL.items()]
    refused = rows_of(PAGE, "| reason | model types |")[:-1]
    assert {name: reason for reason, names in refused for name in names.split(", ")} == families.NOT_SERVED
    chains = rows_of(PAGE, "| model type, by chains | a checkpoint |")
    assert chains == [[name, checkpoint] for name, checkpoint in families.CHAINS.items()]
    assert f"[{len(FAMILIES)} model types]" in (Path(__file__).parents[1] / "README.md").read_text()
