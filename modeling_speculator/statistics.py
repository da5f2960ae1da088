"""What speculation achieved, counted as in the literature: tokens per step, acceptance per position."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SpeculationStatistics:
    """Counts of one `generate` call, or of one row of its batch.

    Attributes:
        steps: verifying forwards (of a batch: summed over its rows, each counted until it ended).
        tokens: tokens emitted by them; the prefill's token is not counted.
        accepted_per_position: `n_predict` shares: in which share of the steps at least i + 1 drafted tokens were
            emitted. A step that emits m tokens accepted m - 1, after an end of sequence or of budget cut it.
        drafted_tokens: nodes verified, roots and padding not counted.
        per_sequence: the same, one per row of the batch; empty for a row.
    """

    steps: int
    tokens: int
    accepted_per_position: list[float]
    drafted_tokens: int
    per_sequence: tuple["SpeculationStatistics", ...] = ()

    @property
    def tokens_per_step(self) -> float | None:
        """τ: 1 for a speculator that never guesses right, None where no step was made."""
        return self.tokens / self.steps if self.steps else None

    @classmethod
    def from_counts(cls, emitted: torch.Tensor, n_nodes: torch.Tensor, n_predict: int) -> "SpeculationStatistics":
        """Counts (steps, batch) of tokens emitted (0 after a row's end) and nodes verified (roots included)."""
        emitted, drafted = emitted.cpu(), n_nodes.cpu() - 1
        rows = [_count(emitted[:, row], drafted[:, row], n_predict) for row in range(emitted.shape[1])]
        return _count(emitted.flatten(), drafted.flatten(), n_predict, tuple(rows))


def _count(emitted: torch.Tensor, drafted: torch.Tensor, n_predict: int, rows: tuple = ()) -> SpeculationStatistics:
    live = emitted > 0
    steps = int(live.sum())
    accepted = [int((emitted >= position + 2).sum()) for position in range(n_predict)]
    return SpeculationStatistics(
        steps=steps,
        tokens=int(emitted.sum()),
        accepted_per_position=[count / steps if steps else 0.0 for count in accepted],
        drafted_tokens=int(drafted[live].sum()),
        per_sequence=rows,
    )
