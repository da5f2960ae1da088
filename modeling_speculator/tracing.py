"""What was drafted at each step and what became of it, for a picture: `trace_speculation` in the generation config."""

from dataclasses import dataclass

import torch

from .candidate_tree import CandidateTree
from .verification import Verified


@dataclass(frozen=True)
class TracedStep:
    """One verifying forward over one row's candidate tree. Node 0 is the root, the last token before the step.

    Attributes:
        tokens: ids of the nodes, a parent before its children.
        parents, depths: of the nodes; 0 at the root.
        probabilities: that the base model, as it is (no temperature, no processors), gives each node after its parent.
        ranks: of each node among all tokens after its parent, 1 the most probable.
        accepted: the drafted nodes that were emitted, from the root down.
        emitted: ids: those of `accepted`, and after them the base model's own, unless the text ended before it.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    probabilities: tuple[float, ...]
    ranks: tuple[int, ...]
    accepted: tuple[int, ...]
    emitted: tuple[int, ...]


class Trace:
    """Records the steps of a call. It reads logits a second time and waits for the device: not for measurements."""

    def __init__(self):
        self.steps: list[list[TracedStep | None]] = []  # of each step, each row; None for one that has ended

    def record(self, tree: CandidateTree, logits: torch.Tensor, verified: Verified) -> None:
        """Notes a step: logits (batch, nodes, vocab)."""
        log_probs = logits.to(tree.input_ids.device).float().log_softmax(-1)
        after_parent = log_probs.gather(1, tree.parents[:, :, None].expand_as(log_probs))
        own = after_parent.gather(2, tree.input_ids[:, :, None])  # (batch, nodes, 1)
        ranks = (after_parent > own).sum(-1) + 1
        columns = [tree.input_ids, tree.parents, tree.depths, own[..., 0].exp(), ranks]
        columns = [column.tolist() for column in columns]
        rows = zip(*columns, tree.n_nodes.tolist(), *(part.tolist() for part in verified), strict=True)
        self.steps.append([_of_row(*row) for row in rows])

    def of_rows(self, batch: int) -> list[tuple[TracedStep, ...]]:
        """The steps of each row until it ended."""
        return [tuple(step[row] for step in self.steps if step[row] is not None) for row in range(batch)]


def _of_row(tokens, parents, depths, probabilities, ranks, n_nodes, emitted, path, n_emitted) -> TracedStep | None:
    if n_emitted == 0:
        return None
    nodes = [tuple(values[:n_nodes]) for values in (tokens, parents, depths, probabilities, ranks)]
    emitted, last = tuple(emitted[:n_emitted]), path[n_emitted - 1]
    # Where the text ended within a draft, the last token was drafted, too; else it is the base model's own.
    end = [node for node in range(1, n_nodes) if (parents[node], tokens[node]) == (last, emitted[-1])]
    return TracedStep(*nodes, accepted=(*path[1:n_emitted], *end), emitted=emitted)
