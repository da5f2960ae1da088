"""Which drafted tokens the base model accepts: pure functions of tensors."""

from typing import NamedTuple

import torch

from .candidate_tree import CandidateTree


class Verified(NamedTuple):
    """What one step emits. Entries at and beyond `n_tokens` are meaningless.

    tokens: (batch, max_depth + 1), the accepted tokens, then the base model's own next one (the bonus token).
    nodes: (batch, max_depth + 1), the node that each token was drawn at: the root, then the accepted ones.
    n_tokens: (batch,), how many are emitted.
    """

    tokens: torch.Tensor
    nodes: torch.Tensor
    n_tokens: torch.Tensor

    @property
    def last(self) -> torch.Tensor:
        """(batch, 1), the place of the last token; of a row that has ended, which has none, the first place."""
        return (self.n_tokens[:, None] - 1).clamp(min=0)


def accept_drawn(drawn: torch.Tensor, tree: CandidateTree) -> Verified:
    """Descends from the root while the token drawn at a node is a child of it.

    Candidates are chosen without chance, given the text so far. A draw at a node is one from the base model's own
    distribution whatever its children are, and so the text that is emitted has that distribution.

    Args:
        drawn: (batch, nodes), the token that the base model draws after each node.
    """
    if tree.max_depth == 0:
        return Verified(drawn, torch.zeros_like(drawn), tree.n_nodes)
    agrees = (drawn.gather(1, tree.parents) == tree.input_ids) & (tree.depths > 0)
    agrees[:, 0] = True  # the root was drawn in the step before
    accepted = (agrees[:, None] | ~tree.ancestors).all(-1)  # (batch, nodes)
    n_accepted, last = torch.where(accepted, tree.depths, -1).max(-1)  # siblings differ: there is one deepest node
    nodes = tree.input_ids.shape[1]
    on_path = tree.ancestors.gather(1, last[:, None, None].expand(-1, 1, nodes))[:, 0]
    place = torch.where(on_path, tree.depths, tree.max_depth + 1)  # one place too many, for those off the path
    path = drawn.new_zeros(len(drawn), tree.max_depth + 2)
    path.scatter_(1, place, torch.arange(nodes, device=drawn.device).expand_as(place))
    path = path[:, : tree.max_depth + 1]
    return Verified(drawn.gather(1, path), path, n_accepted + 1)


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
        places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        is_eos = (tokens[..., None] == eos_token_ids).any(-1)
        up_to_eos = torch.where(is_eos, places, places[-1] + 1).amin(-1)
        budget = budget.masked_fill(up_to_eos <= n_tokens, 0)
        n_tokens = torch.minimum(n_tokens, up_to_eos)
    return Verified(tokens, nodes, n_tokens), budget
