"""What the host knows of a call: one tensor from the device after each step."""

from typing import NamedTuple

import torch

from .candidate_tree import CandidateTree
from .rows import Rows
from .sampling import check_drawable
from .verification import Verified


class StepRecord(NamedTuple):
    """n_candidates: what was drafted; n_nodes, n_emitted: of each row, nodes verified and tokens emitted."""

    n_candidates: int
    n_nodes: list[int]
    n_emitted: list[int]


class Progress:
    """Which rows go on, how long the longest is, how large the next tree; and the record of the steps so far.

    Args:
        longest: columns of the prompts.
        streamer: is given the tokens as they are read; or None.
    """

    def __init__(self, batch: int, longest: int, streamer):
        self.batch, self.longest, self.streamer = batch, longest, streamer
        self.steps: list[StepRecord] = []
        self.unfinished = True
        self.n_nodes: list[int] = []  # of the next tree; where steps are compiled, of the last
        self.n_emitted: list[int] = []  # by the last step

    def report(
        self, rows: Rows, verified: Verified, drawable: torch.Tensor | None, tree: CandidateTree
    ) -> torch.Tensor:
        """All that the host wants to know, as one tensor: of what was emitted, and of a tree."""
        parts = [rows.budget, rows.lengths[:, 0], verified.n_tokens, tree.n_nodes]
        if drawable is not None:
            parts.append(drawable.all(-1))
        if self.streamer is not None:
            parts.append(verified.tokens.T.flatten())
        return torch.cat(parts)

    def read(self, report: torch.Tensor, has_drawable: bool) -> None:
        """The one time in a step that the host waits for the device."""
        numbers = report.tolist()
        budget, lengths, self.n_emitted, self.n_nodes, *rest = (
            numbers[i : i + self.batch] for i in range(0, len(numbers), self.batch)
        )
        if has_drawable:
            check_drawable(all(rest.pop(0)))
        self.unfinished, self.longest = any(budget), max(lengths)
        if self.streamer is not None:
            for tokens in rest[: max(self.n_emitted)]:
                self.streamer.put(torch.tensor(tokens))

    def record(self, n_candidates: int, n_nodes: list[int]) -> float:
        """Notes a step that has been read, and what was drafted for it.

        Returns:
            The tokens that it emitted for each row that was still going on, on average.
        """
        self.steps.append(StepRecord(n_candidates, n_nodes, self.n_emitted))
        return sum(self.n_emitted) / max(1, sum(n > 0 for n in self.n_emitted))
