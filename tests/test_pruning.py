"""Trees that lose nodes before the streams start: the text stays, and what is kept is what the early exit says."""

import itertools
from functools import partial

import pytest
import torch
from drafters import streaming_speculator
from test_drafter_state import SAME, farthest, speculate
from tiny_models import VOCAB, prompts, tiny_model
from torch.nn import functional as F
from transformers import CompileConfig, GenerationConfig

from modeling_speculator.candidate_tree import CandidateTree
from modeling_speculator.context_vectors import read_text
from modeling_speculator.families import final_norm, output_logits
from modeling_speculator.modeling_streaming import StreamingConfig
from modeling_speculator.streams_of_nodes import EarlyExit, Pruning
from modeling_speculator.trainers.objective import Objective


def pruned(model, n_kept=4, **config):
    speculator = streaming_speculator(model, exit_rank=4, **config)
    speculator.config.n_kept_nodes = n_kept
    return speculator


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", "gpt_bigcode", "granite"])
@pytest.mark.parametrize("n_kept", [1, 4, 9])
def test_the_text_and_what_drafts_start_from(family, n_kept):
    """In a batch with padding, whose rows keep other nodes each."""
    model = tiny_model(family)
    oracle, out = speculate(model, pruned(model, n_kept), prompts())
    assert farthest(oracle, out) < SAME
    if n_kept == 9:
        assert out.speculation.tokens_per_step > 1.1


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True)},
        {"do_sample": True, "top_k": 12},
        {"repetition_penalty": 1.3},
        {"return_dict_in_generate": True, "output_logits": True},
        {"n_tree_nodes": 7},
        {"n_lookup_tokens": 4},
    ],
    ids=lambda options: " ".join(options),
)
def test_options(llama, options):
    speculator = pruned(llama)
    for dial in ("n_tree_nodes", "n_lookup_tokens"):
        setattr(speculator.config, dial, options.get(dial, getattr(speculator.config, dial)))
    options = {name: value for name, value in options.items() if not name.startswith("n_")}
    options = {"max_new_tokens": 24, "do_sample": False} | options
    speculator.config.n_kept_nodes = None
    torch.manual_seed(0)
    expected = llama.generate(**prompts(), **options, assistant_model=speculator)
    speculator.config.n_kept_nodes = 4
    torch.manual_seed(0)
    given = llama.generate(**prompts(), **options, assistant_model=speculator)
    if "output_logits" in options:
        torch.testing.assert_close(torch.stack(given.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
        expected, given = expected.sequences, given.sequences
    assert given.tolist() == expected.tolist()


@pytest.mark.parametrize("cache", [None, "static"])
def test_what_is_counted_and_traced(llama, cache):
    """The tree that was verified, and no node of those that were left out."""
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
    generate = partial(llama.generate, **prompts(), cache_implementation=cache)
    config = GenerationConfig(**options, trace_speculation=True, pad_token_id=0)
    out = generate(generation_config=config, assistant_model=pruned(llama))
    for row in out.speculation.per_sequence:
        assert row.drafted_tokens == 3 * (row.steps - 1)  # none in the first step
        for step in row.trace[1:]:
            assert len(step.tokens) == 4 and step.parents[0] == step.depths[0] == 0
            assert all(step.depths[at] == step.depths[step.parents[at]] + 1 for at in range(1, 4))
    plain = generate(**options, assistant_model=pruned(llama, n_kept=100))
    assert plain.speculation.drafted_tokens > 3 * plain.speculation.steps
    assert plain.sequences.tolist() == out.sequences.tolist()


@torch.no_grad()
def test_the_most_probable_nodes_are_kept(llama):
    """Of all choices of n nodes that hold their parents, the one with the most probable paths."""
    torch.manual_seed(0)
    early = EarlyExit(32, 4)
    root, candidates = torch.randint(VOCAB, (2, 1)), torch.randint(VOCAB, (2, 4, 3))
    candidates[1, 1:, 0] = candidates[1, 0, 0]  # the second row has fewer nodes
    tree, states = CandidateTree.merge(root, candidates, 13), torch.randn(2, 13, 32)
    logits = output_logits(llama, final_norm(llama)(early(states)))
    log_probs = logits.log_softmax(-1)
    for n in (1, 3, 5):
        kept = Pruning(early, n, llama).kept(states, tree)
        for row in range(2):
            real = int(tree.n_nodes[row])
            parents, tokens = tree.parents[row].tolist(), tree.input_ids[row].tolist()
            paths = [0.0]
            for node in range(1, real):
                paths.append(paths[parents[node]] + float(log_probs[row, parents[node], tokens[node]]))
            whole = [
                (0, *others)
                for others in itertools.combinations(range(1, real), n - 1)
                if all(parents[at] in (0, *others) for at in others)
            ]
            assert tuple(kept[row].tolist()) == max(whole, key=lambda nodes: sum(paths[at] for at in nodes))


@torch.no_grad()
def test_ancestors_are_kept_however_numbers_go(llama):
    """Where all children are impossible, not a number, or equally probable."""
    root, candidates = torch.randint(VOCAB, (2, 1)), torch.randint(VOCAB, (2, 4, 3))
    candidates[1, 1:, 0] = candidates[1, 0, 0]
    tree = CandidateTree.merge(root, candidates, 13)
    for value in (0.0, torch.nan, 1e30):
        kept = Pruning(EarlyExit(32, 4), 8, llama).kept(torch.full((2, 13, 32), value), tree)
        only = tree.only(kept)
        assert kept[:, 0].tolist() == [0, 0] and only.n_nodes.tolist() == [8, min(8, int(tree.n_nodes[1]))]
        for row in range(2):
            n, parents = int(only.n_nodes[row]), only.parents[row]
            assert all(only.depths[row, at] == only.depths[row, parents[at]] + 1 for at in range(1, n))
            assert only.depths[row, n:].tolist() == [0] * (8 - n)


def test_its_training(llama):
    """The cross-entropy of what the early exit says comes next, and a gradient in its weights alone."""
    speculator = streaming_speculator(llama, exit_rank=4)
    text = torch.randint(VOCAB, (2, 14), generator=torch.Generator().manual_seed(0))
    reading = read_text(llama, text[:, :11], torch.ones_like(text[:, :11]), [1])
    forward = partial(speculator, reading.hidden_states[:, :10], text[:, 1:], text[:, 2:], base_model=llama)
    out = forward(
        objective=Objective(["cross_entropy"], [1.0], [0.0] * 3, [3, 2, 2]), features=reading.features[:, :10]
    )
    states = final_norm(llama)(speculator.speculator.exit(reading.features[:, :10]))
    logits = llama.get_output_embeddings()(states)
    torch.testing.assert_close(out.loss, F.cross_entropy(logits.flatten(0, 1), text[:, 1:11].flatten()))
    out.loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in speculator.speculator.exit.parameters())
    assert all(weight.grad is None for weight in llama.parameters())


def test_refused(llama):
    shape = {"vocab_size": VOCAB, "emb_dim": 32}
    with pytest.raises(ValueError, match="beside a trained `exit_rank`"):
        StreamingConfig(**shape, n_kept_nodes=4)
    with pytest.raises(ValueError, match="`n_kept_nodes` must be None, or an integer of at least 1"):
        StreamingConfig(**shape, n_kept_nodes=0, exit_rank=8)
    speculator = pruned(llama, n_kept=0)
    with pytest.raises(ValueError, match="`n_kept_nodes` must be"):
        llama.generate(**prompts(), assistant_model=speculator)
    speculator.config.n_kept_nodes = 4
    with pytest.raises(ValueError, match="leave out `output_hidden_states`"):
        options = {"output_hidden_states": True, "return_dict_in_generate": True}
        llama.generate(**prompts(), assistant_model=speculator, max_new_tokens=4, **options)
