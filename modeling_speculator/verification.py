"""Which drafted tokens the base model accepts: pure functions of tensors."""

from typing import NamedTuple

import torch

from .candidate_tree import CandidateTree


class Verified(NamedTuple):
    """What one step emits. Entries at and beyond `n_tokens` are meaningless.

    tokens: (batch, depth + 1), the accepted tokens, then the base model's own next one (the bonus token).
    nodes: (batch, depth + 1), the node that each token was drawn at: the root, then the accepted ones.
    n_tokens: (batch,), how many are emitted.
    """

    tokens: torch.Tensor
    nodes: torch.Tensor
    n_tokens: torch.Tensor


def verify_greedy(logits: torch.Tensor, tree: CandidateTree) -> Verified:
    """Descends from the root while the base model's most probable token is a child: logits (batch, nodes, vocab)."""
    return accept(logits.argmax(-1), tree)


def accept(drawn: torch.Tensor, tree: CandidateTree) -> Verified:
    """Descends from the root while the token drawn at a node is a child of it.

    Args:
        drawn: (batch, nodes), the token that the base model draws after each node.
    """
    drawn = drawn.gather(1, tree.paths.flatten(1)).view_as(tree.paths)  # (batch, n_candidates, depth + 1)
    agrees = drawn[..., :-1] == tree.candidates
    n_accepted, best = agrees.cumprod(-1).sum(-1).max(-1)  # (batch,)
    best = best[:, None, None].expand(-1, 1, drawn.shape[-1])
    return Verified(drawn.gather(1, best)[:, 0], tree.paths.gather(1, best)[:, 0], n_accepted + 1)


def cut_at_end(
    verified: Verified, eos_token_ids: torch.Tensor | None, budget: torch.Tensor
) -> tuple[Verified, torch.Tensor]:
    """Cuts what a step emits after the first end-of-sequence token, and at the tokens that a sequence may still have.

    Args:
        eos_token_ids: (n_eos,), or None.
        budget: (batch,), tokens that each sequence may still emit; 0 for one that has ended.

    Returns:
        The cut result, and the budget (batch,) that is left: 0 for sequences that have ended.
    """
    tokens, nodes, n_tokens = verified
    n_tokens = torch.minimum(n_tokens, budget)
    budget = budget - n_tokens
    if eos_token_ids is not None:
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        is_eos = torch.isin(tokens, eos_token_ids) & (steps < n_tokens[:, None])
        has_eos = is_eos.any(-1)
        n_tokens = torch.where(has_eos, is_eos.int().argmax(-1) + 1, n_tokens)
        budget = budget.masked_fill(has_eos, 0)
    return Verified(tokens, nodes, n_tokens), budget
