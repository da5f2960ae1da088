"""Lossless for any family, cache, batch, option and draft, in a thousand generated cases.

Random models accept almost nothing, so an oracle drafts that is right with a probability, on a random branch; what was
accepted is counted over all cases, and every accepted length and every branch must have occurred.
"""

import functools
import os
from collections import Counter

import pytest
import torch
from drafters import Oracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, VOCAB, character_tokenizer, tiny_model
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria


N_PREDICT, N_CANDIDATES = 3, 5
TOKENIZER = character_tokenizer()
model_of = functools.cache(tiny_model)


class Favour(LogitsProcessor):
    """A user's own, which reads the text and its length."""

    def __call__(self, input_ids, scores):
        scores[:, (input_ids.shape[1] * 7) % VOCAB] += 2.0
        return scores.scatter_add(1, input_ids[:, -1:], torch.full((len(scores), 1), -5.0))


class Until(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 16 == 3


OPTIONS = {
    "none": {},
    "ends": {"eos_token_id": [3, 17, 44, 61]},
    "ends late": {"eos_token_id": list(range(20)), "min_new_tokens": 6},
    "penalty": {"repetition_penalty": 1.4},
    "ngrams": {"no_repeat_ngram_size": 2, "eos_token_id": [5, 9]},
    "banned": {"bad_words_ids": [[5], [8, 9], [11]], "suppress_tokens": [1, 2, 30]},
    "own processor": {"logits_processor": [Favour()]},
    "own criterion": {"stopping_criteria": [Until()], "eos_token_id": 62},
    "strings": {"stop_strings": ["a", "Zk", "q"], "tokenizer": TOKENIZER, "eos_token_id": 62},
    "guided": {"guidance_scale": 1.4},
    "warm": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "nucleus": {"do_sample": True, "top_p": 0.8, "eos_token_id": [3, 17]},
    "penalised sample": {"do_sample": True, "repetition_penalty": 1.2, "min_p": 0.02},
}
EXAMPLES = int(os.environ.get("THEOREM_EXAMPLES", 1000))
accepted, branches = Counter(), Counter()


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    attn_implementation=st.sampled_from(["sdpa", "sdpa", "eager"]),
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    max_new_tokens=st.integers(1, 24),
    option=st.sampled_from(sorted(OPTIONS)),
    cache=st.sampled_from(["dynamic", "dynamic", "static", "passed in"]),
    n_predict=st.sampled_from([N_PREDICT, N_PREDICT, 1, 2, 5]),
    n_candidates=st.sampled_from([N_CANDIDATES, N_CANDIDATES, 0, 1, 2, 7]),
    n_lookup_tokens=st.sampled_from([0, 0, 0, 2, 6]),
    p_right=st.sampled_from([0.7, 0.7, 0.7, 0.4, 0.0, 1.0]),
    seed=st.integers(0, 999),
)
def test_any_case(
    family,
    attn_implementation,
    lengths,
    max_new_tokens,
    option,
    cache,
    n_predict,
    n_candidates,
    n_lookup_tokens,
    p_right,
    seed,
):
    model, options = model_of(family, attn_implementation), OPTIONS[option]
    generator = torch.Generator().manual_seed(seed)
    if cache == "passed in":  # rows of equal length only
        lengths = lengths[:1] * len(lengths)
    longest = max(lengths)
    input_ids = torch.randint(1, VOCAB, (len(lengths), longest), generator=generator)
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    input_ids = input_ids * mask

    def generate(drafter=None, **extra):
        request = {"do_sample": False, "max_new_tokens": max_new_tokens} | options | extra
        if cache == "passed in":
            request["past_key_values"] = DynamicCache(config=model.config)
        elif cache == "static" and drafter is not None:  # its plain text is the same
            request["cache_implementation"] = "static"
        torch.manual_seed(seed)
        return model.generate(
            input_ids, attention_mask=mask, assistant_model=drafter, return_dict_in_generate=True, **request
        )

    sampled = options.get("do_sample", False)
    undrafted = Oracle(model, input_ids, mask, n_candidates=0)
    expected = generate(undrafted if sampled else None).sequences
    text_mask = torch.nn.functional.pad(mask, (0, expected.shape[1] - longest), value=1)
    oracle = Oracle(model, expected, text_mask, n_predict, n_candidates, p_right, seed)
    oracle.config.n_lookup_tokens = n_lookup_tokens
    most = max(n_predict, n_lookup_tokens) if n_candidates else 0
    out = generate(oracle)

    assert out.sequences.tolist() == expected.tolist()
    rows = out.speculation.per_sequence
    assert len(rows) == len(lengths)
    assert out.speculation.steps == sum(row.steps for row in rows)
    assert out.speculation.tokens == sum(row.tokens for row in rows) <= len(rows) * (expected.shape[1] - longest - 1)
    for row in rows:
        assert row.steps == len(row.emitted_per_step) == len(row.candidates_per_step)
        assert row.drafted_tokens <= row.steps * (n_predict * n_candidates + n_lookup_tokens)
        assert all(1 <= n <= most + 1 for n in row.emitted_per_step)
        assert sum(row.accepted_per_position) * row.steps == pytest.approx(row.tokens - row.steps)
        accepted.update((option, cache, n - 1) for n in row.emitted_per_step)
    branches.update(oracle.right_branches)


def test_all_accepted_lengths_occurred():
    """With every option and every cache; and the right branch was each of five."""
    if not accepted:
        pytest.skip("needs the cases above")
    for option in OPTIONS:
        assert {n for name, _, n in accepted if name == option} >= set(range(N_PREDICT + 1)), option
    for cache in ("dynamic", "static", "passed in"):
        assert {n for _, name, n in accepted if name == cache} >= set(range(N_PREDICT + 1)), cache
    assert set(branches) >= set(range(N_CANDIDATES))


@pytest.mark.parametrize("family", ["llama", "gpt_bigcode", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 9}, {"repetition_penalty": 1.4}])
def test_a_row_of_a_batch_is_the_row_alone(family, options):
    """For samples: rows that hold the same prompt differ, and each is what its noise makes of it."""
    model = model_of(family)
    options = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True} | options
    lengths, together = [9, 4, 1], torch.zeros(3, 9, dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    for row, length in enumerate(lengths):
        together[row, 9 - length :] = torch.randint(1, VOCAB, (length,), generator=generator)
    mask = (torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]).long()

    def generate(rows, drafter):
        torch.manual_seed(6)
        return model.generate(together[rows], attention_mask=mask[rows], assistant_model=drafter, **options)

    undrafted = Oracle(model, together, mask, n_candidates=0)
    text = generate(slice(0, 3), undrafted).sequences
    oracle = Oracle(model, text, torch.nn.functional.pad(mask, (0, 20), value=1), p_right=0.7)
    assert generate(slice(0, 3), oracle).sequences.tolist() == text.tolist()
    for row, length in enumerate(lengths):
        if options["do_sample"] and row > 0:
            continue  # alone it is the first row, whose noise is another
        alone = together[row : row + 1, 9 - length :]
        torch.manual_seed(6)
        drafter = Oracle(model, text[row : row + 1, 9 - length :], p_right=0.7)
        out = model.generate(alone, attention_mask=torch.ones_like(alone), assistant_model=drafter, **options)
        assert out.sequences[0].tolist() == text[row, 9 - length :].tolist()
