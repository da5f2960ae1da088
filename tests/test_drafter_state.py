"""Drafters that know more of a call than the last context vector, in the loop: the text, and what they start from."""

import threading

import pytest
import torch
from drafters import (
    OracleWithContext,
    context_speculator,
    eagle3_speculator,
    eagle_speculator,
    hydra_plus_speculator,
    streaming_speculator,
)
from tiny_models import prompts, tiny_model
from torch.nn import functional as F
from transformers import AutoModel, CompileConfig, GenerationConfig

from modeling_speculator import PromptLookup


GREEDY = {"do_sample": False, "max_new_tokens": 24}


def speculate(model, speculator, inputs, seed=0, **options):
    """The text, by an oracle that is right on a random branch with probability 0.7, and how far its starts are off."""
    options = GREEDY | options
    torch.manual_seed(seed)
    # Sampled text is ours, which does not depend on what is drafted.
    off = {"assistant_model": PromptLookup()} if options["do_sample"] else {}
    expected = model.generate(**inputs, **options, **off)
    mask = inputs["attention_mask"].repeat_interleave(options.get("num_return_sequences", 1), dim=0)
    oracle = OracleWithContext(model, speculator, expected, mask, p_right=0.7)
    torch.manual_seed(seed)
    out = model.generate(**inputs, **options, assistant_model=oracle, return_dict_in_generate=True)
    assert out.sequences.tolist() == expected.tolist()
    return oracle, out


def farthest(oracle, out):
    """Of all drafts of rows that had not ended, relative to the size of what they start from."""
    steps = [row.steps for row in out.speculation.per_sequence]
    used = [distance[row] for row, n in enumerate(steps) for distance in oracle.distances[:n]]
    assert len(used) > 4
    return max(used) / float(oracle.context_vectors.norm(dim=-1).mean())


SAME = 1e-4


MAKERS = [
    context_speculator,
    eagle_speculator,
    eagle3_speculator,
    hydra_plus_speculator,
    streaming_speculator,
]


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_as_in_one_pass(family, make):
    """In a batch with padding, whose rows accept differently."""
    model = tiny_model(family)
    oracle, out = speculate(model, make(model), prompts())
    assert farthest(oracle, out) < SAME
    assert out.speculation.tokens_per_step > 1.3
    assert len({tuple(row.emitted_per_step) for row in out.speculation.per_sequence}) > 1


OPTIONS = [
    {"cache_implementation": "static"},
    {"cache_implementation": "static", "output_logits": True},
    {"do_sample": True, "top_k": 12},
    {"repetition_penalty": 1.3},
    {"prefill_chunk_size": 4},
    {"num_return_sequences": 2, "do_sample": True},
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_bigcode"])
def test_options(family, options, make):
    model = tiny_model(family)
    inputs = prompts(1) if "prefill_chunk_size" in options else prompts()
    assert farthest(*speculate(model, make(model), inputs, **options)) < SAME


@pytest.mark.parametrize("make", MAKERS)
def test_under_autocast(llama, make):
    """Where products are in another dtype than the keys."""
    speculator = make(llama)
    for n in (1, 3):
        with torch.autocast("cpu", torch.bfloat16):
            expected = llama.generate(**prompts(n), **GREEDY)
            assert llama.generate(**prompts(n), **GREEDY, assistant_model=speculator).shape == expected.shape


@pytest.mark.parametrize("make", MAKERS)
def test_steps_that_draft_nothing(llama, make):
    """Adaptive control goes on telling of what is verified."""
    speculator, options = make(llama), GREEDY | {"max_new_tokens": 60}
    expected = llama.generate(**prompts(1), **options)
    oracle = OracleWithContext(llama, speculator, expected, p_right=0.7)
    config = GenerationConfig(**options, speculation="adaptive", return_dict_in_generate=True)
    out = llama.generate(**prompts(1), generation_config=config, assistant_model=oracle)
    assert out.sequences.tolist() == expected.tolist()
    assert farthest(oracle, out) < SAME
    assert 0 in out.speculation.per_sequence[0].candidates_per_step


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dials", [{}, {"n_tree_nodes": 6}, {"n_lookup_tokens": 6}, {"n_candidates": 0}], ids=str)
def test_its_own_drafts(llama, dials, make):
    speculator = make(llama, **dials)
    expected = llama.generate(**prompts(), **GREEDY)
    assert llama.generate(**prompts(), **GREEDY, assistant_model=speculator).tolist() == expected.tolist()


@pytest.mark.parametrize("make", MAKERS)
def test_a_compiled_step(llama, make):
    speculator = make(llama)
    expected = llama.generate(**prompts(2), **GREEDY).tolist()
    compiled = {"cache_implementation": "static", "compile_config": CompileConfig()}
    with torch._dynamo.config.patch(error_on_recompile=False):
        first = llama.generate(**prompts(2), **GREEDY, assistant_model=speculator, **compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = llama.generate(**prompts(2), **GREEDY, assistant_model=speculator, **compiled)
    assert first.tolist() == expected and again.tolist() == expected


@pytest.mark.parametrize("make", MAKERS)
def test_nothing_stays_in_the_models(llama, make):
    speculator = make(llama)
    before = set(vars(speculator.speculator))
    llama.generate(**prompts(), **GREEDY, assistant_model=speculator)
    assert set(vars(speculator.speculator)) == before and speculator.speculator.ends is None
    assert not any(layer._forward_pre_hooks for layer in llama.model.layers)


@pytest.mark.parametrize("make", MAKERS)
def test_two_threads_and_two_base_models(llama, make):
    other, speculator, runs = tiny_model("llama", seed=4), make(llama), []
    expected = {model: model.generate(**prompts(), **GREEDY) for model in (llama, other)}
    mask = F.pad(prompts()["attention_mask"], (0, 24), value=1)
    oracles = [OracleWithContext(model, speculator, expected[model], mask, p_right=0.7) for model in [*expected] * 2]

    def work(model, oracle):
        options = GREEDY | {"return_dict_in_generate": True, "assistant_model": oracle}
        runs.append((oracle, model.generate(**prompts(), **options)))

    threads = [threading.Thread(target=work, args=pair) for pair in zip([*expected] * 2, oracles, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 4 and all(farthest(oracle, out) < SAME for oracle, out in runs)


@pytest.mark.parametrize("make", MAKERS)
def test_saved_and_loaded(llama, tmp_path, make):
    speculator = make(llama)
    speculator.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(speculator)
    assert loaded.config.to_diff_dict() == speculator.config.to_diff_dict()
    again = loaded.state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in speculator.state_dict().items())
    assert farthest(*speculate(llama, loaded, prompts())) < SAME
