"""`cache_implementation="static"`: the step is one compiled function, and compiled once for what does not change."""

import logging
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

import pytest
import torch
from accelerate import dispatch_model
from drafters import Oracle
from tiny_models import FAMILIES, HIDDEN, VOCAB, tiny_model
from transformers import CompileConfig

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel, static_decoding


# Traced as a whole, as on a GPU, but not turned into C++: that takes half a minute each.
TRACED = CompileConfig(backend="eager", mode=None)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def speculator():
    torch.manual_seed(0)
    return MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=HIDDEN, inner_dim=16)).eval()


def prompts(length=6, rows=2):
    input_ids = torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(input_ids)
    if rows > 1 and length > 2:
        mask[1, :2] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def assert_same_text(model, drafter, inputs, compile_config=TRACED, **options):
    """Sampled text is compared with that of the dynamic cache."""
    options = {"do_sample": False, "max_new_tokens": 20} | options
    torch.manual_seed(0)
    expected = model.generate(**inputs, **options, assistant_model=drafter if options["do_sample"] else None)
    torch.manual_seed(0)
    static = {"cache_implementation": "static", "compile_config": compile_config}
    out = model.generate(**inputs, **options, **static, assistant_model=drafter, return_dict_in_generate=True)
    assert out.sequences.tolist() == expected.tolist()
    return out.speculation


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_traced_as_a_whole(family, speculator):
    model = tiny_model(family, one_layer_of_each_kind=True)  # a layer takes a second
    assert_same_text(model, speculator, prompts())


def test_oracle(llama):
    """Its draft is Python, so only the plain loop of fixed shapes can run it."""
    inputs = prompts()
    text = llama.generate(**inputs, max_new_tokens=40, do_sample=False)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 40), value=1)
    for options in ({}, {"repetition_penalty": 1.3}):
        text = llama.generate(**inputs, max_new_tokens=40, do_sample=False, **options)
        oracle = Oracle(llama, text, mask, p_right=0.7)
        speculation = assert_same_text(llama, oracle, inputs, None, max_new_tokens=40, **options)
        assert set(speculation.emitted_per_step) == {1, 2, 3, 4}


OPTIONS = {
    "sampling": {"do_sample": True},
    "warped": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "min_p": 0.01, "eos_token_id": [3, 4, 5]},
    "typical": {"do_sample": True, "typical_p": 0.8, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "top_h": 0.8},
    "ends": {"eos_token_id": list(range(12))},
    "suppress": {"suppress_tokens": [5, 6], "renormalize_logits": True, "remove_invalid_values": True},
    "walked": {"repetition_penalty": 1.4, "eos_token_id": [3]},
    "walked samples": {"repetition_penalty": 1.4, "do_sample": True},
    "hidden states": {"output_hidden_states": True},
    "no candidates": {"n_candidates": 0},
    "best nodes": {"n_tree_nodes": 7},
    "lookup": {"n_lookup_tokens": 5},
    "fewer heads": {"n_heads": 2},
    "one row": {"rows": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(llama, speculator, name):
    options = dict(OPTIONS[name])
    speculator.config.n_candidates = options.pop("n_candidates", 5)
    speculator.config.n_tree_nodes = options.pop("n_tree_nodes", None)
    speculator.config.n_heads = options.pop("n_heads", None)
    speculator.config.n_lookup_tokens = options.pop("n_lookup_tokens", 0)
    assert_same_text(llama, speculator, prompts(rows=options.pop("rows", 2)), **options)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "eos_token_id": 3}, {"repetition_penalty": 1.4}])
def test_nothing_is_compiled_again(llama, speculator, options):
    """For another text, prompt length, budget or seed, nor for dials and batches that were there before."""
    for n_candidates, rows in ((0, 1), (5, 1), (5, 2)):
        speculator.config.n_candidates = n_candidates
        assert_same_text(llama, speculator, prompts(rows=rows), **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n_candidates, rows, length, budget in ((5, 1, 9, 30), (0, 1, 1, 3), (5, 2, 40, 9), (0, 1, 3, 60)):
            speculator.config.n_candidates = n_candidates
            assert_same_text(llama, speculator, prompts(length, rows), max_new_tokens=budget, **options)


def test_views_grow(monkeypatch, speculator):
    """As the text does, in powers of two, one compilation each."""
    monkeypatch.setattr("modeling_speculator.static_decoding._LEAST_VIEW", 16)
    model = tiny_model("mistral")
    assert_same_text(model, speculator, prompts(), max_new_tokens=70)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_text(model, speculator, prompts(), max_new_tokens=70)


def test_statistics_are_those_of_the_dynamic_cache(llama, speculator):
    inputs = prompts()
    options = {"do_sample": False, "return_dict_in_generate": True, "assistant_model": speculator}
    for n_tokens in (1, 2, 3, 9):
        dynamic = llama.generate(**inputs, **options, max_new_tokens=n_tokens).speculation
        static = llama.generate(
            **inputs, **options, max_new_tokens=n_tokens, cache_implementation="static"
        ).speculation
        assert static == dynamic


def test_memory_that_graphs_are_tied_to_is_used_again(llama, speculator, monkeypatch):
    """As on a GPU: the next call finds its tensors where the last one had them."""
    monkeypatch.setattr(static_decoding, "_DEVICES_WITH_GRAPHS", ("cpu",))
    monkeypatch.setattr(static_decoding, "_workspaces", WeakKeyDictionary())

    def addresses():
        workspace = static_decoding._workspaces[llama]
        return [t.data_ptr() for layer in workspace.layers for t in layer] + [
            t.data_ptr() for t in workspace.tensors.values()
        ]

    assert_same_text(llama, speculator, prompts())
    first = addresses()
    for length, options in ((9, {}), (3, {"do_sample": True}), (6, {"repetition_penalty": 1.3}), (40, {})):
        assert_same_text(llama, speculator, prompts(length), **options)
        assert addresses() == first
    out = llama.generate(  # what is handed out is not what the next call writes into
        **prompts(),
        cache_implementation="static",
        compile_config=TRACED,
        assistant_model=speculator,
        do_sample=False,
        max_new_tokens=20,
        return_dict_in_generate=True,
    )
    text, keys = out.sequences.clone(), out.past_key_values.layers[0].keys.clone()
    assert_same_text(llama, speculator, prompts(9))
    assert torch.equal(out.sequences, text)
    assert torch.equal(out.past_key_values.layers[0].keys, keys)
    assert_same_text(llama, speculator, prompts(rows=1))  # another shape, other tensors
    assert addresses() != first
    workspace = static_decoding._workspaces[llama]
    tensors = [t for layer in workspace.layers for t in layer] + list(workspace.tensors.values())
    assert all(hasattr(tensor, "_dynamo_static_input_type") for tensor in tensors)


def test_two_threads(llama, speculator, monkeypatch):
    monkeypatch.setattr(static_decoding, "_DEVICES_WITH_GRAPHS", ("cpu",))
    options = {"do_sample": False, "max_new_tokens": 60, "assistant_model": speculator}
    expected = [llama.generate(**prompts(length), **options).tolist() for length in (4, 7, 9)]
    static = {"cache_implementation": "static", "compile_config": TRACED}
    assert llama.generate(**prompts(4), **options, **static).tolist() == expected[0]

    def run(index):
        return [llama.generate(**prompts((4, 7, 9)[index]), **options, **static).tolist() for _ in range(3)]

    with ThreadPoolExecutor(3) as pool:
        for index, texts in enumerate(pool.map(run, range(3))):
            assert texts == 3 * [expected[index]]


@pytest.fixture
def log(caplog):
    """What transformers logs, which it keeps from the root logger."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_more_settings_than_may_be_compiled(llama, speculator, monkeypatch, log):
    """Are run uncompiled, and that is said."""
    monkeypatch.setattr(static_decoding, "_LIMITS", (2, 4096))
    for step in range(4):
        assert_same_text(llama, speculator, prompts(), do_sample=True, temperature=0.5 + step / 10)
    assert "can't be compiled" in log.text


def test_a_call_in_inference_mode(llama, speculator, monkeypatch):
    monkeypatch.setattr(static_decoding, "_DEVICES_WITH_GRAPHS", ("cpu",))
    monkeypatch.setattr(static_decoding, "_workspaces", WeakKeyDictionary())
    with torch.inference_mode():
        assert_same_text(llama, speculator, prompts())
        assert_same_text(llama, speculator, prompts(8))
    assert_same_text(llama, speculator, prompts())
    with torch.inference_mode():
        assert_same_text(llama, speculator, prompts(8))
    assert_same_text(llama, speculator, prompts(9))


def test_a_model_that_cannot_be_compiled(speculator, tmp_path, log):
    """Runs all the same, and says so."""
    model = tiny_model("llama")
    model.model.layers[0].register_forward_hook(lambda *args: torch._dynamo.graph_break())
    assert_same_text(model, speculator, prompts())
    assert "can't be compiled for LlamaForCausalLM, and runs uncompiled" in log.text
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    devices |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = dispatch_model(tiny_model("llama"), devices, main_device="cpu", offload_dir=str(tmp_path))
    assert_same_text(model, speculator, prompts())
    assert "not compiled, because it is spread over devices" in log.text


def test_only_new_tokens_and_embeddings_are_not_compiled_again(llama, speculator):
    """What is in the cache only, and not in the text, is no constant of the step."""

    def generate(length, drafter, **static):
        embeds = llama.get_input_embeddings()(prompts(length, 1)["input_ids"])
        options = {"do_sample": False, "max_new_tokens": 12, "assistant_model": drafter}
        return llama.generate(inputs_embeds=embeds, **options, **static).tolist()

    static = {"cache_implementation": "static", "compile_config": TRACED}
    assert generate(5, speculator, **static) == generate(5, None)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert generate(8, speculator, **static) == generate(8, None)


def test_a_large_cache_by_max_cache_len(llama, speculator):
    assert_same_text(llama, speculator, prompts(), max_cache_len=1000)


def test_compilation_can_be_disabled(llama, speculator, monkeypatch):
    monkeypatch.setattr("modeling_speculator.static_decoding._compiled", None)
    assert_same_text(llama, speculator, prompts(), disable_compile=True)
    assert_same_text(llama, speculator, prompts(), compile_config=None)


def test_compiled_to_machine_code(speculator):
    assert_same_text(tiny_model("llama", one_layer_of_each_kind=True), speculator, prompts(), CompileConfig())
