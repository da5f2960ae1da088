"""What callers give beside the tokens: token types, and whether they want a cache."""

import pytest
import torch
from drafters import oracle_for
from test_static import TRACED, speculator  # noqa: F401  a fixture
from tiny_models import VOCAB, prompts, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_speculator.transformers_api import CACHE, cache_of


OPTIONS = {"do_sample": False, "max_new_tokens": 24, "return_dict_in_generate": True}
STATIC = {"cache_implementation": "static"}


def token_types(inputs):
    """Types that differ, in the last column, too, which all that is generated takes over."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, inputs["input_ids"].shape, generator=generator)


@torch.no_grad()
def context_vectors(model, text, mask, types):
    mask = torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    decoder = model.get_decoder()
    return decoder(text, attention_mask=mask, position_ids=positions, token_type_ids=types).last_hidden_state


@pytest.mark.parametrize("static", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("n_candidates", [0, 5])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode"])
def test_token_types_that_are_embedded(family, rows, n_candidates, static):
    model, inputs = tiny_model(family), prompts(rows)
    plain = model.generate(**inputs, **OPTIONS).sequences
    for types in (torch.zeros_like(inputs["input_ids"]), token_types(inputs)):
        expected = model.generate(**inputs, token_type_ids=types, **OPTIONS).sequences
        assert expected.tolist() != plain.tolist()  # 0 is embedded, too
        all_types = torch.cat([types, types[:, -1:].expand(-1, 24)], dim=1)
        oracle = oracle_for(model, inputs, expected, n_candidates=n_candidates)
        oracle.context_vectors = context_vectors(model, expected, inputs["attention_mask"], all_types)
        out = model.generate(**inputs, token_type_ids=types, **OPTIONS, **static, assistant_model=oracle)
        assert out.sequences.tolist() == expected.tolist()
        assert out.speculation.tokens_per_step > 1.5 or not n_candidates


def test_token_types_in_a_compiled_step(speculator):  # noqa: F811
    model, inputs = tiny_model("gpt2"), prompts()
    inputs["token_type_ids"] = token_types(inputs)
    expected = model.generate(**inputs, **OPTIONS).sequences
    out = model.generate(**inputs, **OPTIONS, **STATIC, compile_config=TRACED, assistant_model=speculator)
    assert out.sequences.tolist() == expected.tolist()


def test_token_types_of_rows_that_have_ended():
    """Their padding in a cache that is handed back has them, too."""
    model, inputs = tiny_model("gpt2"), {"input_ids": torch.arange(1, 19).view(2, 9)}
    inputs["token_type_ids"] = token_types(inputs)
    text = model.generate(**inputs, **OPTIONS).sequences
    options = OPTIONS | {"eos_token_id": int(text[0, 9 + 5])}
    caches = DynamicCache(), DynamicCache()
    expected = model.generate(**inputs, **options, **{CACHE: caches[0]})
    assert expected.sequences.shape[1] > 9 + 6
    oracle = oracle_for(model, {"attention_mask": torch.ones(2, 9, dtype=torch.long)}, expected.sequences)
    model.generate(**inputs, **options, **{CACHE: caches[1]}, assistant_model=oracle)
    for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)


@pytest.mark.parametrize("static", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gpt_bigcode", "gemma3_text"])
def test_a_caller_who_wants_no_cache(family, static):
    model, inputs = tiny_model(family), prompts()
    expected = model.generate(**inputs, **OPTIONS, use_cache=False)
    oracle = oracle_for(model, inputs, expected.sequences)
    out = model.generate(**inputs, **OPTIONS, **static, use_cache=False, assistant_model=oracle)
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert cache_of(out) is None and cache_of(expected) is None
    assert set(out.speculation.emitted_per_step) == {1, 2, 3, 4}


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_a_model_saved_without_cache(where, tmp_path):
    """As a fine-tuning with recomputed activations leaves it."""
    model, inputs = tiny_model("llama"), prompts()
    if where == "config.json":
        model.config.use_cache = False
    else:
        model.generation_config.use_cache = False
    model.save_pretrained(tmp_path)
    if where == "config.json":
        (tmp_path / "generation_config.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not model.generation_config.use_cache
    options = OPTIONS | {"eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    oracle = oracle_for(model, inputs, expected.sequences)
    out = model.generate(**inputs, **options, assistant_model=oracle)
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert cache_of(out) is None
