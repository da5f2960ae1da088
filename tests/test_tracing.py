"""A trace says of each drafted node what the base model thinks of it, and what became of it."""

import pytest
import torch
from drafters import oracle_for
from tiny_models import VOCAB, prompts
from transformers import GenerationConfig

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel


OPTIONS = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True, "pad_token_id": 0}


@pytest.fixture(scope="module")
def plain(llama):
    return llama.generate(**prompts(), **OPTIONS).sequences


def traced(model, drafter, **options):
    config = GenerationConfig(**OPTIONS | {"trace_speculation": True} | options)
    return model.generate(**prompts(), generation_config=config, assistant_model=drafter)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"repetition_penalty": 1.5}], ids=str)
def test_a_trace_tells_the_text(llama, options):
    plain = llama.generate(**prompts(), **OPTIONS | options).sequences
    out = traced(llama, oracle_for(llama, prompts(), plain, n_candidates=3), **options)
    assert out.sequences.tolist() == plain.tolist()
    check(out, plain)
    assert {len(step.accepted) for stats in out.speculation.per_sequence for step in stats.trace} == {0, 1, 2, 3}


def test_a_text_that_ends_within_a_draft(llama, plain):
    """Its last token was drafted and accepted, though nothing comes after it."""
    row = plain[:1, -20:].tolist()[0]
    # The prefill's token comes first, and of four tokens a step the last is the base model's own.
    ends = next(token for at, token in enumerate(row) if at > 5 and at % 4 != 0 and token not in row[:at])
    inputs = {key: value[:1] for key, value in prompts().items()}
    drafter = oracle_for(llama, inputs, plain[:1], p_right=1.0)
    config = GenerationConfig(**OPTIONS | {"trace_speculation": True, "eos_token_id": ends})
    out = llama.generate(**inputs, generation_config=config, assistant_model=drafter)
    last = out.speculation.per_sequence[0].trace[-1]
    assert out.sequences[0, -1] == ends == last.emitted[-1]
    assert [last.tokens[node] for node in last.accepted] == list(last.emitted)


def test_trees_of_best_nodes(llama, plain):
    torch.manual_seed(0)
    config = MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=32, n_tree_nodes=6)
    check(traced(llama, MLPSpeculatorPreTrainedModel(config).eval()), plain)


def check(out, plain):
    """That the traces of all rows tell how the text came about."""
    length = plain.shape[1] - OPTIONS["max_new_tokens"]
    for row, stats in enumerate(out.speculation.per_sequence):
        text = out.sequences[row, length:].tolist()
        assert [token for step in stats.trace for token in step.emitted] == text[1:]
        assert tuple(len(step.emitted) for step in stats.trace) == stats.emitted_per_step
        assert sum(len(step.tokens) - 1 for step in stats.trace) == stats.drafted_tokens
        before = text[0]
        for step in stats.trace:
            assert step.tokens[0] == before
            path = [step.tokens[node] for node in step.accepted]
            own = 0 if step is stats.trace[-1] and len(path) == len(step.emitted) else 1  # of the base model
            assert path == list(step.emitted[: len(path)]) and len(step.emitted) == len(path) + own
            assert [step.parents[node] for node in step.accepted] == [0, *step.accepted][: len(path)]
            before = step.emitted[-1]


def test_probabilities_and_ranks_are_the_base_models(llama, plain):
    """By a forward over each node's path alone."""
    out = traced(llama, oracle_for(llama, prompts(), plain, n_candidates=3))
    row = 1
    text = out.sequences[row][prompts()["attention_mask"][row].argmax() :].tolist()  # without padding
    done = len(text) - OPTIONS["max_new_tokens"]
    for step in out.speculation.per_sequence[row].trace:
        for node in range(1, len(step.tokens)):
            path, at = [], step.parents[node]
            while at:
                path, at = [step.tokens[at], *path], step.parents[at]
            with torch.no_grad():
                logits = llama(torch.tensor([text[: done + 1] + path])).logits[0, -1]
            token = step.tokens[node]
            assert step.probabilities[node] == pytest.approx(float(logits.softmax(-1)[token]), rel=1e-3)
            assert step.ranks[node] == int((logits > logits[token]).sum()) + 1
            assert step.depths[node] == len(path) + 1
        done += len(step.emitted)


def test_nothing_is_traced_that_was_not_asked_for(llama, plain):
    drafter = oracle_for(llama, prompts(), plain)
    out = llama.generate(**prompts(), **OPTIONS, assistant_model=drafter)
    assert all(stats.trace is None for stats in out.speculation.per_sequence)
