"""Adaptive speculation picks what is fastest, and never changes the text."""

import pytest
import torch
from drafters import Oracle
from transformers import GenerationConfig

from modeling_speculator import MLPSpeculatorConfig, PromptLookup
from modeling_speculator.adaptive import AdaptiveSpeculation, choices_of


def picks(tokens, seconds, steps=400):
    """What is chosen where a step with k candidates emits tokens[k](step) tokens per row in seconds[k]."""
    now, chosen = 0.0, []
    policy = AdaptiveSpeculation(sorted(tokens), clock=lambda: now)
    for step in range(steps):
        chosen.append(policy.choose())
        now += seconds[chosen[-1]]
        policy.record(chosen[-1], tokens[chosen[-1]](step))
    return chosen


def test_the_fastest_is_picked():
    tokens = {0: lambda _: 1.0, 1: lambda _: 1.8, 5: lambda _: 2.5}
    for fastest, seconds in ((5, {0: 1, 1: 1.1, 5: 1.2}), (1, {0: 1, 1: 1.1, 5: 2.0}), (0, {0: 1, 1: 2.0, 5: 3.0})):
        chosen = picks(tokens, seconds)
        assert chosen[100:].count(fastest) > 0.85 * 300
        assert set(chosen) == {0, 1, 5}


def test_a_change_is_noticed():
    tokens = {0: lambda _: 1.0, 5: lambda step: 3.0 if step < 200 else 1.0}
    chosen = picks(tokens, {0: 1, 5: 1.5})
    assert chosen[50:200].count(5) > 120
    assert chosen[300:].count(0) > 80


def test_a_compilation_does_not_count():
    tokens = {0: lambda _: 1.0, 5: lambda _: 3.0}
    now, policy = 0.0, AdaptiveSpeculation([0, 5], clock=lambda: now)
    chosen = []
    for step in range(300):
        chosen.append(policy.choose())
        now += 500.0 if step == 40 else 1.0
        policy.record(chosen[-1], tokens[chosen[-1]](step))
    assert chosen[50:].count(5) > 200


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 20}, {"cache_implementation": "static"}])
def test_text_does_not_depend_on_it(llama, options):
    input_ids = torch.arange(1, 6).repeat(2, 1)
    input_ids[1] += 7

    def generate(drafter, **extra):
        config = GenerationConfig(**{"do_sample": False} | options, max_new_tokens=100, pad_token_id=0, **extra)
        torch.manual_seed(0)
        return llama.generate(
            input_ids, generation_config=config, assistant_model=drafter, return_dict_in_generate=True
        )

    expected = generate(Oracle(llama, input_ids, n_candidates=0)).sequences
    out = generate(Oracle(llama, expected, p_right=0.7), speculation="adaptive")
    assert out.sequences.tolist() == expected.tolist()
    assert set(out.speculation.candidates_per_step) == {0, 1, 5}
    assert len(out.speculation.candidates_per_step) == out.speculation.steps
    assert set(generate(Oracle(llama, expected)).speculation.candidates_per_step) == {5}


def test_choices():
    """Nothing, a candidate, what the dials say; these with and without a lookup branch."""
    assert choices_of(MLPSpeculatorConfig()) == [(0, 0), (1, 0), (5, 0)]
    assert choices_of(MLPSpeculatorConfig(n_lookup_tokens=8)) == [(0, 0), (1, 0), (1, 8), (5, 0), (5, 8)]
    assert choices_of(MLPSpeculatorConfig(n_tree_nodes=9, n_lookup_tokens=8)) == [(0, 0), (5, 0), (5, 8)]
    assert choices_of(PromptLookup(4).config) == [(0, 0), (1, 4)]


def test_another_word(llama):
    config = GenerationConfig(speculation="fast", max_new_tokens=2, do_sample=False)
    with pytest.raises(ValueError, match="`speculation`.*'adaptive'.*'fast'"):
        llama.generate(
            torch.ones(1, 2, dtype=torch.long),
            generation_config=config,
            assistant_model=Oracle(llama, torch.ones(1, 2, dtype=torch.long)),
        )
