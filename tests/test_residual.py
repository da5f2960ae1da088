"""The residual cell, which reads and scores tokens by the base model of the call, and belongs to that one."""

import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, prompts, tiny_model
from torch.nn import functional as F
from trainings import arguments, rows
from transformers import AutoModel, CompileConfig, GenerationConfig

from modeling_speculator.base_model_ends import BaseModelEnds
from modeling_speculator.families import output_logits
from modeling_speculator.measuring.acceptance import measure_acceptance
from modeling_speculator.measuring.benchmarking import step_times
from modeling_speculator.modeling_residual import ResidualConfig, ResidualSpeculator
from modeling_speculator.trainers import (
    DistillationTrainer,
    ModelArguments,
    SpeculatorTrainer,
    load_or_create_speculator,
)
from modeling_speculator.vocabularies import beside


SHAPE = {"vocab_size": VOCAB, "emb_dim": 32, "n_predict": 3}


def new(base_model, spread=0.2, **config):
    """One whose weights are far from where they start."""
    torch.manual_seed(0)
    speculator = ResidualSpeculator(ResidualConfig(**SHAPE | config)).eval()
    speculator.speculator.start_from(base_model)
    with torch.no_grad():
        for weight in speculator.parameters():
            weight.add_(spread * torch.randn_like(weight))
    return speculator


@pytest.fixture
def speculator(llama):
    return new(llama)


@pytest.mark.parametrize("family", ["llama", "granite", "cohere", "gemma2", "gpt_bigcode"])
@torch.no_grad()
def test_by_hand(family):
    """With all that the family does to logits."""
    model = tiny_model(family)
    speculator = new(model, inner_dim=24)
    cell = speculator.speculator
    hidden_states, input_ids = torch.randn(2, 5, 32), torch.randint(VOCAB, (2, 7))
    logits = speculator(hidden_states, input_ids, base_model=model).logits
    state = hidden_states
    for i in range(3):
        token = F.embedding(input_ids[:, i : i + 5], model.get_input_embeddings().weight)
        token = token * getattr(model.get_input_embeddings(), "embed_scale", 1.0)  # which no norm can tell
        read = [F.rms_norm(state, (32,), cell.state_norm[i].weight, 1e-5)]
        read += [F.rms_norm(token, (32,), cell.token_norm[i].weight, 1e-5)]
        state = state + F.silu(torch.cat(read, -1) @ cell.proj_in[i].weight.T) @ cell.proj_out[i].weight.T
        torch.testing.assert_close(logits[i], output_logits(model, state))


def test_a_new_one_adds_nothing_yet(llama):
    speculator = load_or_create_speculator(ModelArguments(base_model="here", method="residual"), llama)
    hidden_states = torch.randn(1, 2, 32)
    logits = speculator(hidden_states, torch.zeros(1, 4, dtype=torch.long), base_model=llama).logits
    torch.testing.assert_close(logits, llama.lm_head(hidden_states).expand(3, -1, -1, -1))


def test_it_has_no_vocabulary(llama, speculator, tmp_path):
    speculator.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is ResidualSpeculator
    assert loaded.state_dict().keys() == speculator.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in speculator.state_dict().items())
    assert loaded.num_parameters() == 3 * (3 * 32 * 32 + 2 * 32)
    tied = new(llama, tie_weights=True)
    tied.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).num_parameters() == tied.num_parameters() == 3 * 32 * 32 + 2 * 32


# In the loop


@pytest.mark.parametrize("dials", [{}, {"n_tree_nodes": 6}, {"n_lookup_tokens": 5}], ids=str)
def test_the_output_is_the_base_models(family, dials):
    model, inputs = tiny_model(family), prompts()
    speculator = new(model, **dials)
    plain = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    out = model.generate(
        **inputs, assistant_model=speculator, max_new_tokens=20, do_sample=False, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences, plain)
    assert out.speculation.drafted_tokens > 0 and speculator.speculator.ends is None


OPTIONS = [
    {"do_sample": True},
    {"cache_implementation": "static"},
    {"cache_implementation": "static", "compile_config": CompileConfig(backend="aot_eager")},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options))
def test_sampling_and_static_shapes(llama, speculator, options):
    config = GenerationConfig(max_new_tokens=20, **options)
    texts = []
    for n_candidates in (0, 5):
        speculator.config.n_candidates = n_candidates
        torch.manual_seed(0)
        texts.append(llama.generate(**prompts(), assistant_model=speculator, generation_config=config))
    assert torch.equal(*texts)


def test_a_compiled_step_is_compiled_once(llama, speculator):
    """For every call there are other objects around the same layers."""
    torch._dynamo.reset()
    compiled = {"cache_implementation": "static", "compile_config": CompileConfig(backend="aot_eager")}
    options = {"max_new_tokens": 20, "do_sample": False, "assistant_model": speculator} | compiled
    first = llama.generate(**prompts(), **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(llama.generate(**prompts(), **options), first)


def test_simulated_steps_are_the_loops(llama, speculator):
    measured = measure_acceptance(llama, speculator, **prompts(), max_new_tokens=40, do_sample=False)
    assert all(row.emitted_per_step == row.simulated_per_step for row in measured)


def test_the_time_of_its_drafts_is_measured(llama, speculator):
    """Though in each call another object drafts."""
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "assistant_model": speculator}
    times = step_times(llama, speculator, lambda: llama.generate(**prompts(1), **options).speculation, repeats=1)
    assert times["draft_ms"] > 0


def test_two_base_models_at_once(llama, speculator):
    """Of one kind, in two threads, by one speculator, which knows neither."""
    other = tiny_model("llama")
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "embed" not in name:
                weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    expected = [model.generate(**prompts(), max_new_tokens=40, do_sample=False) for model in (llama, other)]
    assert not torch.equal(*expected)
    drafts = [
        speculator.beside(model).generate_candidates(torch.ones(1, 1, 32), torch.ones(1, 1).long())
        for model in (llama, other)
    ]
    assert not torch.equal(*drafts)  # the LM heads differ
    texts = {}

    def run(at, model):
        texts[at] = model.generate(**prompts(), max_new_tokens=40, do_sample=False, assistant_model=speculator)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate((llama, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(texts[at], expected[at]) for at in range(2))


def test_other_numbers_of_tokens(speculator):
    """Of the base model: some added, padded to a multiple, some gone."""
    for vocab_size in (VOCAB + 1, 128, VOCAB - 3):
        model = tiny_model("llama")
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
        inputs = prompts()
        inputs["input_ids"].clamp_(max=vocab_size - 1)
        inputs["input_ids"][0, 3] = vocab_size - 1
        plain = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        text = model.generate(**inputs, max_new_tokens=20, do_sample=False, assistant_model=speculator)
        assert torch.equal(text, plain)
        drafted = beside(model, speculator).generate_candidates(torch.randn(50, 1, 32), torch.ones(50, 1).long())
        assert int(drafted.max()) < min(vocab_size, VOCAB)


def test_its_own_number_of_tokens_can_change(llama, speculator):
    """Which is all that there is to change: tokens that were added to the base model are drafted, too."""
    model = tiny_model("llama")
    model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    speculator.resize_token_embeddings(VOCAB + 5)
    assert speculator.config.vocab_size == VOCAB + 5
    plain = model.generate(**prompts(), max_new_tokens=20, do_sample=False)
    text = model.generate(**prompts(), max_new_tokens=20, do_sample=False, assistant_model=speculator)
    assert torch.equal(text, plain)
    states, tokens = torch.randn(1, 2, 32), torch.zeros(1, 4, dtype=torch.long)
    assert speculator(states, tokens, base_model=model).logits.shape[-1] == VOCAB + 5


def test_beside_an_adapted_base_model(llama, speculator):
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    plain = model.generate(**prompts(), max_new_tokens=20, do_sample=False)
    text = model.generate(**prompts(), max_new_tokens=20, do_sample=False, assistant_model=speculator)
    assert torch.equal(text, plain)


# Whose it is


def test_another_base_model(llama, speculator, tmp_path):
    other = tiny_model("llama")
    with torch.no_grad():
        other.get_input_embeddings().weight.normal_()
    with pytest.raises(ValueError, match="was trained beside a base model with other embeddings"):
        other.generate(**prompts(), max_new_tokens=4, assistant_model=speculator)
    with pytest.raises(ValueError, match="was trained beside a base model with other embeddings"):
        SpeculatorTrainer(speculator, other, arguments(tmp_path, max_steps=1), train_dataset=rows(2, 24))
    with pytest.raises(ValueError, match="pass `base_model` to its forward"):
        speculator(torch.ones(1, 2, 32), torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize(("change", "warns"), [("bfloat16", False), ("8 bit", False), ("far", True)])
def test_the_same_base_model_a_little_changed(speculator, change, warns):
    model = tiny_model("llama")
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        if change == "bfloat16":
            weight.copy_(weight.bfloat16())
        elif change == "8 bit":
            scale = weight.abs().amax(-1, keepdim=True) / 127
            weight.copy_((weight / scale).round() * scale)
        else:
            weight.add_(0.4 * weight.std() * torch.randn_like(weight))
    said = []
    logger = "modeling_speculator.base_model_ends.logger.warning_once"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger, said.append)
        speculator.speculator.check_base_model(model)
    assert bool(said) == warns and all("fewer drafts will be accepted" in line for line in said)


def test_embeddings_that_can_not_be_read(llama, speculator):
    with torch.device("meta"):
        elsewhere = type(llama)(llama.config)
    assert BaseModelEnds(elsewhere, VOCAB).sketch(torch.arange(32)) is None
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_speculator.base_model_ends.logger.warning_once", said.append)
        speculator.speculator.check_base_model(elsewhere)
        speculator.speculator.sketch.zero_()  # as it is where they could not be read in training
        speculator.speculator.check_base_model(llama)
    assert len(said) == 2 and all("only its sizes tell" in line for line in said)
    assert "can't be read here" in said[0] and "could not be read when" in said[1]


# Training


@pytest.mark.parametrize("options", [{}, {"loss": ["argmax"]}, {"loss": ["forward_kl"]}], ids=str)
@pytest.mark.parametrize("stage", [1, 2])
def test_a_recipe_trains_one(tmp_path, llama, stage, options):
    model = load_or_create_speculator(ModelArguments(base_model="here", method="residual", n_predict=3), llama)
    of_the_base = {name: weight.clone() for name, weight in llama.named_parameters()}
    data = rows(2, 24)
    args = arguments(tmp_path, max_steps=60, learning_rate=1e-2, save_strategy="no", weight_decay=0.0, **options)
    trainer_class, more = (SpeculatorTrainer, {}) if stage == 1 else (DistillationTrainer, {"generation_length": 12})
    trainer = trainer_class(model, llama, args, train_dataset=data, eval_dataset=data, **more)
    untrained = trainer.evaluate()
    trainer.train()
    trained = trainer.evaluate()
    assert trained["eval_loss"] < untrained["eval_loss"] - 0.1
    assert all(torch.equal(weight, of_the_base[name]) for name, weight in llama.named_parameters())
    assert all(weight.grad is None for weight in llama.parameters())
    assert model.speculator.ends is None and model.speculator.sketch.any()


def test_bad_configs():
    with pytest.raises(ValueError, match="drop `scale_input`"):
        ResidualConfig(**SHAPE, scale_input=True)
    with pytest.raises(ValueError, match="`method` must be one of residual"):
        ResidualConfig(**SHAPE, method="sum_rnn")
