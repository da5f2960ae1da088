"""The tree against a slow one built node by node, and its logits against the base model on each path alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB, tiny_model
from transformers import DynamicCache

from modeling_speculator.cache import SpeculativeCache
from modeling_speculator.candidate_tree import CandidateTree
from modeling_speculator.families import attention_windows
from modeling_speculator.verification import Verified, accept_drawn, cut_at_end


def tree_of(candidates, root=7):
    candidates = torch.as_tensor(candidates)
    batch, n_candidates, depth = candidates.shape
    return CandidateTree.merge(torch.full((batch, 1), root), candidates, 1 + n_candidates * depth)


def path_tokens(tree, row, node):
    """The tokens from the root to a node, by its ancestors."""
    nodes = tree.ancestors[row, node].nonzero().flatten().tolist()
    assert tree.depths[row, nodes].tolist() == list(range(len(nodes)))
    return tuple(tree.input_ids[row, nodes].tolist())


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(2, 5))
def test_merge_is_the_set_of_prefixes(seed, batch, n_candidates, depth, vocab):
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randint(vocab, (batch, n_candidates, depth), generator=generator)
    tree = tree_of(candidates)
    for row in range(batch):
        prefixes = {(7, *c[:n].tolist()) for c in candidates[row] for n in range(depth + 1)}
        nodes = [path_tokens(tree, row, node) for node in range(tree.n_nodes[row])]
        assert len(nodes) == len(set(nodes))
        assert set(nodes) == prefixes
        assert tree.depths[row, : tree.n_nodes[row]].tolist() == sorted(len(n) - 1 for n in nodes)
        for node in range(1, tree.n_nodes[row]):
            assert nodes[tree.parents[row, node]] == nodes[node][:-1]
        assert not tree.depths[row, tree.n_nodes[row] :].any()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
def test_accept_descends_while_the_draw_is_a_child(seed, batch, n_candidates, depth):
    generator = torch.Generator().manual_seed(seed)
    tree = tree_of(torch.randint(3, (batch, n_candidates, depth), generator=generator))
    drawn = torch.randint(3, tree.input_ids.shape, generator=generator)
    tokens, nodes, n_tokens = accept_drawn(drawn, tree)
    for row in range(batch):
        known = {path_tokens(tree, row, node): node for node in range(tree.n_nodes[row])}
        path, expected_nodes, expected_tokens = (7,), [], []
        while path in known:
            expected_nodes.append(known[path])
            expected_tokens.append(int(drawn[row, known[path]]))
            path = (*path, expected_tokens[-1])
        assert nodes[row, : n_tokens[row]].tolist() == expected_nodes
        assert tokens[row, : n_tokens[row]].tolist() == expected_tokens


def test_cut_at_end():
    verified = Verified(torch.tensor([[1, 2, 9], [9, 9, 3], [4, 5, 6], [9, 1, 1]]), None, torch.tensor([3, 2, 3, 3]))
    cut, budget = cut_at_end(verified, torch.tensor([9, 8]), torch.tensor([3, 9, 2, 0]))
    assert cut.n_tokens.tolist() == [3, 1, 2, 0]
    assert budget.tolist() == [0, 0, 0, 0]
    cut, budget = cut_at_end(verified, None, torch.tensor([4, 9, 2, 0]))
    assert cut.n_tokens.tolist() == [3, 2, 2, 0]
    assert budget.tolist() == [1, 7, 0, 0]


@torch.no_grad()
def test_tree_logits_are_the_base_models_on_each_path(family):
    for attn_implementation in ("sdpa", "eager"):
        model = tiny_model(family, attn_implementation)
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(VOCAB, (2, 6), generator=generator)
        tree = tree_of(torch.randint(4, (2, 5, 3), generator=generator))

        cache = SpeculativeCache(2, capacity=6 + 16, windows=attention_windows(model.config))
        model(prompt, past_key_values=cache)
        cache.start_steps(torch.ones_like(prompt), max_nodes=16)
        mask = cache.prepare_step(tree, root_column=torch.full((2, 1), 6), in_use=6 + 16)
        logits = model(tree.input_ids, attention_mask=mask, position_ids=6 + tree.depths, past_key_values=cache).logits
        for row in range(2):
            for node in range(tree.n_nodes[row]):
                path = torch.tensor([[*prompt[row].tolist(), *path_tokens(tree, row, node)]])
                torch.testing.assert_close(logits[row, node], model(path).logits[0, -1], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_cache_reuses_rejected_slots(llama):
    """After many steps that each reject most of the tree, a cache that holds just the text is enough."""
    prompt, steps = torch.arange(1, 6)[None], 20
    cache = SpeculativeCache(2, capacity=5 + steps + 7, windows={None: None})
    llama(prompt, past_key_values=cache)
    cache.start_steps(torch.ones_like(prompt), max_nodes=7)
    text = prompt
    for step in range(steps):
        root = torch.tensor([[step % VOCAB]])
        tree = tree_of(torch.randint(VOCAB, (1, 2, 3)), root=int(root)).trim(7)
        column = torch.tensor([[5 + step]])
        mask = cache.prepare_step(tree, column, in_use=5 + step + 7)
        logits = llama(
            tree.input_ids, attention_mask=mask, position_ids=5 + step + tree.depths, past_key_values=cache
        ).logits
        cache.keep(torch.tensor([[0, 1, 2, 3]]), n_kept=torch.tensor([1]), root_column=column)
        text = torch.cat([text, root], dim=-1)
        torch.testing.assert_close(logits[0, 0], llama(text).logits[0, -1], atol=2e-5, rtol=1e-4)
    assert cache.copy_to(DynamicCache(), 5 + steps, release=True).get_seq_length() == 5 + steps
