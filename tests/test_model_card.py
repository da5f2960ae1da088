"""The card of a speculator, whole, from figures that are given here."""

import json
from pathlib import Path

import pytest
from hub_server import problems_of
from huggingface_hub import ModelCard

from modeling_speculator import MedusaConfig, MLPSpeculatorConfig
from modeling_speculator.drafters import ContextConfig, EagleConfig, HydraConfig, ReDrafterConfig, StreamingConfig
from modeling_speculator.model_cards import render_card


EXPECTED = Path(__file__).with_name("model_card.md")
MACHINE = {"processor": "a CPU", "threads": 2, "date": "2026-01-02"}
VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}


@pytest.fixture
def config():
    known = {"base_model_name_or_path": "org/base", "base_model_revision": "c0ffee"}
    return MLPSpeculatorConfig(vocab_size=100, emb_dim=16, n_predict=2, n_candidates=4, **known)


def figures(tokens_per_step, **more):
    row = {"prompts": 10, "tokens_per_step": tokens_per_step, "tokens_per_step_interval": [1.9, 2.1]}
    row |= {"tokens_per_step_without_loops": tokens_per_step - 0.125, "texts": 20, "looping": 3}
    row |= {"accepted_per_position": [0.7, 0.3]}
    return row | more


ACCEPTANCE = figures(
    2.0,
    categories={
        "humaneval": figures(2.25, looping=20, tokens_per_step_without_loops=None),
        "qa": figures(1.5, looping=0, tokens_per_step_without_loops=1.5, tokens_per_step_interval=None),
    },
    sampled=figures(1.25) | {"sampling": {"temperature": 0.7, "top_p": 1.0, "top_k": 10}},
    settings={"prompts": "some/HumanEval.jsonl.gz", "max_new_tokens": 128, "n_candidates": 4, "n_tree_nodes": None}
    | {"top_k_tokens_per_head": [5, 3], "chat": True, "base_model": "org/base"},
    machine=MACHINE,
    versions=VERSIONS,
)
CELL = {"prompt_length": 64, "new_tokens": 100, "dtype": "torch.bfloat16", "machine": {"gpu": "a GPU"} | MACHINE}
CELL |= {
    "versions": VERSIONS,
    "outputs": 8,
    "identical_outputs": 8,
    "looping": 2,
    "batch_size": 1,
    "base_model": "org/base",
}
LATENCY = [
    CELL | {"method": "generate", "speedup": 1.0, "tokens_per_second": 30.2, "tokens_per_step": 1.0},
    CELL | {"method": "mtp", "skipped": "the base model has no such layers"},
    CELL
    | {"method": "speculator", "n_candidates": 4, "speedup": 1.9, "tokens_per_second": 57.4, "tokens_per_step": 2.0},
    CELL
    | {"method": "generate", "prompt_length": 512, "speedup": 1.0, "tokens_per_second": 1, "tokens_per_step": 1.0},
]
STAGE_1 = {
    "arguments": {"stage": 1, "learning_rate": 1e-3, "max_steps": 20, "accelerator_config": {"split_batches": False}},
    "data": {"dataset": "org/texts", "data_files": None, "sequence_length": 4096, "prompt_length": 64},
    "machine": {"gpu": "a GPU", "gpus": 8} | MACHINE,
    "steps": 20,
    "seconds": 5400.0,
    "losses": [[step, 10 - step / 4] for step in range(1, 21)],
}
STAGE_2 = STAGE_1 | {
    "arguments": {"stage": 2, "learning_rate": 1e-4, "loss": ["forward_kl"]},
    "data": {"data_files": ["mine.jsonl", "more.txt"], "prompt_length": 64, "generation_length": 256},
    "started_from": STAGE_1,
    "losses": [],
    "base_model_weights": "0123456789abcdef",
    "weights": {"model.safetensors": "fedcba9876543210"},
    "model": {"speculator": "org/first"},
    "git_revision": "deadbeef",
    "versions": VERSIONS,
}


def test_the_whole_card(config):
    card = render_card("org/name", config, 1_234_567, STAGE_2, ACCEPTANCE, LATENCY, license="apache-2.0")
    assert card == EXPECTED.read_text()
    assert problems_of(card) == []


def test_what_was_not_measured_says_so(config):
    card = render_card("org/name", config, 2_500_000_000)
    assert card.count("Not measured.") == 2
    assert "How it was trained is not known." in card and "2.50 B parameters" in card
    assert problems_of(card) == []
    data = ModelCard(card).data.to_dict()
    assert data["base_model"] == "org/base" and "model-index" not in data and "datasets" not in data
    assert "license" not in data


def test_a_lookup_branch_is_named(config):
    settings = ACCEPTANCE["settings"] | {"n_lookup_tokens": 8}
    card = render_card("org/name", config, 1, acceptance=ACCEPTANCE | {"settings": settings})
    assert "`top_k_tokens_per_head=[5, 3]` and a lookup branch, `n_lookup_tokens=8`." in card


def test_a_training_in_parts_says_what_changed(config):
    begun = {"steps": [1, 12], "seconds": 1800.0, "processes": 8, "git_revision": "deadbeef", "versions": VERSIONS}
    begun |= {"arguments": {"max_steps": 12, "logging_steps": 5}, "machine": {"gpu": "a GPU", "gpus": 8} | MACHINE}
    went_on = begun | {"steps": [13, 20], "seconds": 3600.0, "arguments": {"max_steps": 20}, "machine": MACHINE}
    went_on |= {"processes": 4, "versions": VERSIONS | {"torch": "2.14.0"}}
    card = render_card("org/name", config, 1, STAGE_1 | {"segments": [begun, went_on]})
    assert "**Stage 1**, on text: 20 steps on `org/texts`, 1.50 h in 2 parts.\n" in card
    changed = "`logging_steps: default`, `max_steps: 20`, `processes: 4`, `torch: 2.14.0`"
    lines = f"- steps 1 to 12, 0.50 h on 8 x a GPU\n- steps 13 to 20, 1.00 h on a CPU: {changed}\n"
    assert f"```\n\n{lines}\n| step |" in card
    assert problems_of(card) == []


def test_every_number_of_the_tables_comes_from_the_files(config):
    """Other figures, another card."""
    texts = {render_card("org/name", config, 1, STAGE_2, ACCEPTANCE, LATENCY)}
    for path, value in (
        (("acceptance", "tokens_per_step"), 9.125),
        (("acceptance", "tokens_per_step_without_loops"), 9.375),
        (("acceptance", "looping"), 7),
        (("acceptance", "sampled", "tokens_per_step"), 9.25),
        (("acceptance", "categories", "qa", "accepted_per_position"), [0.125, 0.5]),
        (("latency", 2, "tokens_per_second"), 77.0),
        (("latency", 2, "speedup"), 7.5),
        (("provenance", "started_from", "losses", 0, 1), 99.5),
    ):
        facts = {"acceptance": ACCEPTANCE, "latency": LATENCY, "provenance": STAGE_2}
        facts = json.loads(json.dumps(facts))
        place = facts
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        texts.add(render_card("org/name", config, 1, **facts))
    assert len(texts) == 9


def test_where_all_texts_loop_there_is_no_figure(config):
    """Of one mode, and of all: then the Hub's index has none either."""
    loop = {"looping": 20, "tokens_per_step_without_loops": None}
    one = ACCEPTANCE | {"sampled": ACCEPTANCE["sampled"] | loop}
    card = render_card("org/name", config, 1, acceptance=one)
    assert "**All texts loop, sampled**" in card and "| sampled | 10 | all loop | 20 of 20 | 1.250 |" in card
    names = [result.metric_name for result in ModelCard(card).data.eval_results]
    assert len(names) == 2 and not any("sampled" in name for name in names)
    card = render_card("org/name", config, 1, acceptance=one | loop | {"categories": {}})
    assert "**All texts loop, greedy and sampled**" in card
    assert "model-index" not in ModelCard(card).data.to_dict()
    assert problems_of(card) == []


def test_figures_of_an_earlier_version_do_not_say_how_many_texts_there_were(config):
    before = {key: value for key, value in ACCEPTANCE.items() if key not in ("texts", "categories", "sampled")}
    assert "| greedy | 10 | 1.875 | 3 | 2.000 |" in render_card("org/name", config, 1, acceptance=before)


FORMS = {
    "sum_rnn": (MLPSpeculatorConfig, {}, "An MLP speculator ([arXiv 2404.19124]", False),
    "medusa": (MedusaConfig, {}, "Medusa heads ([arXiv 2401.10774]", False),
    "context": (ContextConfig, {}, "An MLP speculator ([arXiv 2404.19124]", True),
    "eagle": (EagleConfig, {}, "An EAGLE layer ([arXiv 2401.15077]", True),
    "eagle 3": (EagleConfig, {"feature_layers": [1]}, "An EAGLE-3 layer ([arXiv 2503.01840]", True),
    "eagle 3, read": (EagleConfig, {"feature_layers": [1], "own_lm_head": True}, "An EAGLE-3 layer", False),
    "hydra": (HydraConfig, {}, "Hydra heads ([arXiv 2402.05109]", False),
    "hydra++": (HydraConfig, {"prefix_layer": True}, "Hydra++ heads ([arXiv 2402.05109]", False),
    "redrafter": (ReDrafterConfig, {}, "A recurrent drafter ([arXiv 2403.09919]", False),
    "streaming": (StreamingConfig, {}, "Speculative Streaming ([arXiv 2402.11131]", True),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_card_says_what_it_is(form):
    config_class, options, name, has_no_vocabulary = FORMS[form]
    config = config_class(vocab_size=64, emb_dim=128, base_model_name_or_path="org/base", **options)
    card = render_card("org/drafter", config, 1000)
    assert name in card and ("It has no vocabulary" in card) == has_no_vocabulary
    assert "The output is the base model's own" in card and "load_adapter" not in card


def test_a_card_of_streams_with_a_shared_adapter():
    config = StreamingConfig(vocab_size=64, emb_dim=128, base_model_name_or_path="org/base", shared_adapter=True)
    card = render_card("org/streams", config, 1000)
    assert "with the adapter that lies here" in card and "The output is the base model's own" not in card
    assert 'model.load_adapter("org/streams", adapter_kwargs={"subfolder": "adapter"})\nspeculator = ' in card
