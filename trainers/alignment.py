"""Which context vector is trained with which tokens: the same in both stages."""

from typing import NamedTuple

import torch

from ..context_vectors import Reading


class TrainingBatch(NamedTuple):
    """What the speculator's forward takes, see `MLPSpeculatorPreTrainedModel.forward`, and `Objective`."""

    hidden_states: torch.Tensor
    input_ids: torch.Tensor
    labels: torch.Tensor
    next_states: torch.Tensor
    features: torch.Tensor | None = None
    segments: torch.Tensor | None = None

    def within(self, vocab_size: int) -> "TrainingBatch":
        """For a speculator that may lack some of the tokens: it reads another in their place, and predicts none."""
        input_ids, labels = self.input_ids.clamp(max=vocab_size - 1), known_labels(self.labels, vocab_size)
        return TrainingBatch(self.hidden_states, input_ids, labels, *self[3:])


def known_labels(labels: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Labels with -100 in place of tokens that a speculator lacks."""
    return labels.masked_fill(labels >= vocab_size, -100)


def align(
    reading: Reading,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    n_predict: int,
    segments: torch.Tensor | None = None,
) -> TrainingBatch:
    """Aligns context vectors with the tokens that come after them.

    The vector at position t, which the base model drew token t from, is trained with the tokens t, t + 1, ... as
    inputs of the heads, so that head i predicts token t + 1 + i (arXiv 2404.19124, section 3).

    Args:
        reading: (batch, m + length, ...), what the tokens were drawn from.
        tokens: (batch, m + length).
        labels: (batch, length), the last tokens with -100 where nothing shall be predicted; of the first m only a
            context layer takes note.
        segments: (batch, m + length), see `Cell.with_context`.

    Raises:
        ValueError: if the texts are too short for the heads.
    """
    n, m = labels.shape[1] - n_predict, tokens.shape[1] - labels.shape[1]  # n positions where every head has a target
    if n < 1:
        raise ValueError(
            f"Sequences of {labels.shape[1] + 1} tokens are too short for {n_predict} heads, which need "
            f"{n_predict + 2}. Raise `sequence_length` (stage 2: `generation_length`)."
        )
    states, features, segments = (None if part is None else part[:, : m + n] for part in (*reading, segments))
    next_states = reading.hidden_states[:, m + 1 :]
    return TrainingBatch(states, tokens[:, :-1], labels[:, 1:], next_states, features, segments)
