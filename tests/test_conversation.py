"""A cache of an earlier call: passed in, gone on from, and handed back as plain decoding leaves it."""

import warnings

import pytest
import torch
from drafters import Oracle
from tiny_models import VOCAB, tiny_model
from transformers import DynamicCache, StaticCache
from transformers.utils import generic

from modeling_speculator.transformers_api import CACHE, cache_of


def tokens(length, seed=0, rows=1):
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def talk(model, turns, cache, drafter=None, **options):
    """A conversation of several turns: each goes on from the text and the cache of the one before."""
    text, texts = turns[0][:, :0], []
    for turn in turns:
        text = torch.cat([text, turn], dim=1)
        out = model.generate(
            text,
            attention_mask=torch.ones_like(text),
            assistant_model=drafter(text) if drafter else None,
            do_sample=False,
            max_new_tokens=12,
            return_dict_in_generate=True,
            **options | {CACHE: cache},
        )
        assert cache_of(out) is cache
        text = out.sequences
        texts.append(text.tolist())
    return texts


def caches(model):
    return {
        "dynamic": DynamicCache,
        "of the config": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=80),
    }


@pytest.mark.parametrize("kind", ["dynamic", "of the config", "static"])
@pytest.mark.parametrize("family", ["llama", "gpt_bigcode", "mistral", "gemma3_text"])
def test_turns(family, kind):
    model = tiny_model(family)
    turns = [tokens(5, 1), tokens(3, 2), tokens(4, 3)]
    expected_cache, cache = caches(model)[kind](), caches(model)[kind]()
    expected = talk(model, turns, expected_cache)

    def drafter(text):
        whole = torch.tensor(next(e for e in expected if len(e[0]) > text.shape[1]))
        return Oracle(model, whole, p_right=0.7)

    assert talk(model, turns, cache, drafter) == expected
    for ours, theirs in zip(cache.layers, expected_cache.layers, strict=True):
        assert int(ours.get_seq_length()) == int(theirs.get_seq_length())
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=1e-4)
        assert not ours.keys.is_inference()


def test_a_conversation_begun_without_a_speculator(llama):
    turns = [tokens(5, 1), tokens(3, 2)]
    expected = talk(llama, turns, DynamicCache())
    cache = DynamicCache()
    first = talk(llama, turns[:1], cache)
    text = torch.cat([torch.tensor(first[0]), turns[1]], dim=1)
    oracle = Oracle(llama, torch.tensor(expected[1]), p_right=0.7)
    options = {CACHE: cache, "do_sample": False, "max_new_tokens": 12}
    assert llama.generate(text, assistant_model=oracle, **options).tolist() == expected[1]


def test_only_the_new_tokens_are_passed(llama):
    """With the mask of all."""
    prompt, new = tokens(5), tokens(4, 1)
    expected = None
    for drafter in (None, Oracle(llama, tokens(30))):
        cache = cache_of(llama(prompt, use_cache=True))
        out = llama.generate(
            new,
            attention_mask=torch.ones(1, 9, dtype=torch.long),
            assistant_model=drafter,
            do_sample=False,
            max_new_tokens=12,
            **{CACHE: cache},
        )
        expected = out.tolist() if expected is None else expected
        assert out.tolist() == expected
        assert cache.get_seq_length() == 9 + 11


def test_rows_that_end_apart(llama):
    """Plain decoding goes on with padding where a row has ended, and so does the cache that is handed back."""
    prompt = tokens(5, rows=3)
    options = {"do_sample": False, "max_new_tokens": 20}
    text = llama.generate(prompt, **options)
    options["eos_token_id"] = int(text[1, 11])
    expected_cache, cache = DynamicCache(), DynamicCache()
    expected = llama.generate(prompt, **options | {CACHE: expected_cache})
    assert (expected[1, 12:] == 0).all() and not (expected[:, -1] == 0).all()
    oracle = Oracle(llama, text, p_right=0.7)
    assert llama.generate(prompt, assistant_model=oracle, **options | {CACHE: cache}).tolist() == expected.tolist()
    for ours, theirs in zip(cache.layers, expected_cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-4)
    # Nobody asked for one here, and it costs a forward.
    out = llama.generate(prompt, assistant_model=oracle, return_dict_in_generate=True, **options)
    assert cache_of(out) is None


def test_a_prompt_that_was_padded(llama):
    prompt, mask = tokens(6), torch.tensor([[0, 0, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12}
    expected_cache, cache = DynamicCache(), DynamicCache()
    expected = llama.generate(prompt, **options | {CACHE: expected_cache})
    oracle = Oracle(llama, expected, torch.nn.functional.pad(mask, (0, 12), value=1), p_right=0.7)
    out = llama.generate(prompt, assistant_model=oracle, **options | {CACHE: cache})
    assert out.tolist() == expected.tolist()
    torch.testing.assert_close(cache.layers[1].keys, expected_cache.layers[1].keys, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
def test_the_cache_by_either_of_its_names(llama, name, monkeypatch):
    """Where transformers knows both. Of the new one nobody warns, here least of all."""
    told = []
    monkeypatch.setattr(generic.logger, "warning_once", told.append)
    prompt = torch.arange(1, 9)[None]
    text = llama.generate(prompt, max_new_tokens=12, do_sample=False)
    cache = DynamicCache(config=llama.config)
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, name: cache}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FutureWarning)
        out = llama.generate(prompt, assistant_model=Oracle(llama, text, p_right=0.7), **options)
        handed_back = out[CACHE] if name == CACHE else getattr(out, name)
    assert out.sequences.tolist() == text.tolist()
    assert handed_back is cache and cache.get_seq_length() == text.shape[1] - 1
    if name == CACHE:
        assert not [warning for warning in caught if issubclass(warning.category, FutureWarning)]
        assert not [warning for warning in told if "past_key_values" in warning]
