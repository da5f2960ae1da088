"""What speculation achieved, counted as in the literature: tokens per step, acceptance per position."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .tracing import TracedStep


@dataclass(frozen=True, repr=False)
class SpeculationStatistics:
    """The record of one `generate` call, of one row of its batch, or of several calls.

    Attributes:
        emitted_per_step: tokens that each verifying forward emitted, row after row, each counted until it ended. The
            prefill's token is not counted, nor what an end of sequence or of budget cut.
        candidates_per_step: `n_candidates` at each of these forwards; adaptive speculation varies it.
        drafted_tokens: nodes verified, roots and padding not counted.
        n_predict: tokens that a draft can hold.
        per_sequence: the same, one per row of the batch; empty for a row.
        trace: of a row, what was drafted at each step; None unless the generation config has `trace_speculation`.
    """

    emitted_per_step: tuple[int, ...]
    candidates_per_step: tuple[int, ...]
    drafted_tokens: int
    n_predict: int
    per_sequence: tuple["SpeculationStatistics", ...] = ()
    trace: tuple[TracedStep, ...] | None = None

    @property
    def steps(self) -> int:
        """Verifying forwards; of a batch, summed over its rows."""
        return len(self.emitted_per_step)

    @property
    def tokens(self) -> int:
        """Tokens emitted by them."""
        return sum(self.emitted_per_step)

    @property
    def tokens_per_step(self) -> float | None:
        """τ: 1 for a speculator that never guesses right, None where no step was made."""
        return self.tokens / self.steps if self.steps else None

    @property
    def accepted_per_position(self) -> list[float]:
        """`n_predict` shares: in which share of the steps at least i + 1 drafted tokens were emitted."""
        return [
            sum(emitted >= position + 2 for emitted in self.emitted_per_step) / max(1, self.steps)
            for position in range(self.n_predict)
        ]

    @classmethod
    def from_counts(
        cls,
        emitted: torch.Tensor,
        n_nodes: torch.Tensor,
        n_candidates: list[int],
        n_predict: int,
        traces: list[tuple[TracedStep, ...]] | None = None,
    ) -> "SpeculationStatistics":
        """From counts of each step.

        Args:
            emitted: (steps, batch) tokens, 0 after a row's end.
            n_nodes: (steps, batch) nodes verified, roots included.
            n_candidates: of each step.
            n_predict: tokens that a draft can hold.
            traces: of each row.
        """
        traces = traces or [None] * emitted.shape[1]
        rows = [
            cls(
                emitted_per_step=tuple(n for n in row_emitted if n),
                candidates_per_step=tuple(k for n, k in zip(row_emitted, n_candidates, strict=True) if n),
                drafted_tokens=sum(nodes - 1 for n, nodes in zip(row_emitted, row_nodes, strict=True) if n),
                n_predict=n_predict,
                trace=trace,
            )
            for row_emitted, row_nodes, trace in zip(emitted.T.tolist(), n_nodes.T.tolist(), traces, strict=True)
        ]
        return cls.pool(rows)

    @classmethod
    def pool(cls, parts: Iterable["SpeculationStatistics"]) -> "SpeculationStatistics":
        """The record of several rows or calls together.

        Raises:
            ValueError: if there are none, or they come from speculators of different `n_predict`.
        """
        parts = tuple(parts)
        if len({part.n_predict for part in parts}) != 1:
            raise ValueError(f"Needs records of one `n_predict`, got {[part.n_predict for part in parts]}.")
        return cls(
            emitted_per_step=tuple(n for part in parts for n in part.emitted_per_step),
            candidates_per_step=tuple(k for part in parts for k in part.candidates_per_step),
            drafted_tokens=sum(part.drafted_tokens for part in parts),
            n_predict=parts[0].n_predict,
            per_sequence=parts,
            trace=parts[0].trace if len(parts) == 1 else None,
        )

    def __repr__(self) -> str:
        shares = [round(share, 3) for share in self.accepted_per_position]
        return (
            f"SpeculationStatistics(steps={self.steps}, tokens={self.tokens}, "
            f"tokens_per_step={self.tokens_per_step and round(self.tokens_per_step, 3)}, "
            f"accepted_per_position={shares}, drafted_tokens={self.drafted_tokens})"
        )
