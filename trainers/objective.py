"""What the trainers compute in the speculator's forward: a loss per head, and how often each head is right."""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn import functional as F
from transformers import TemperatureLogitsWarper, TopKLogitsWarper
from transformers.utils import ModelOutput

from ..cells import Cell
from .chunked import CHUNK_ELEMENTS, chunked_linear
from .losses import CHOICE_LOSSES, DISTRIBUTION_LOSSES, mixed


@dataclass
class ObjectiveOutput(ModelOutput):
    """
    loss: scalar, the sum of `losses`, each by its head's weight.
    losses: (n_predict,), the mean loss of each head over the positions that count.
    row_losses: (batch, n_predict), the sums of each row's losses.
    correct, correct_top_k: (batch, n_predict), positions where the true token is the head's first choice, or one of
        the `top_k_tokens_per_head` that it drafts.
    counted: (batch, n_predict), positions that count: those whose label is not -100.
    """

    loss: torch.Tensor | None = None
    losses: torch.Tensor | None = None
    row_losses: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    correct_top_k: torch.Tensor | None = None
    counted: torch.Tensor | None = None


@dataclass
class Objective:
    """Losses by name and weight, and how the heads are fed.

    Attributes:
        losses, loss_weights: a mix of `losses.LOSSES`.
        head_weights: (n_predict,), a factor for each head's loss.
        top_k: (n_predict,), the children that each head drafts.
        unrolled_share: probability that a head gets the choice of the head before it instead of the true token
            (scheduled sampling, arXiv 1506.03099).
        hidden_state_noise: standard deviation of noise on the context vectors, in units of their root mean square.
            (EAGLE, arXiv 2401.15077, section 4.2, trains with noise, of a fixed size.)
        target_temperature, target_top_k: of the base model's distribution, as losses on it see it.
    """

    losses: list[str]
    loss_weights: list[float]
    head_weights: list[float]
    top_k: list[int]
    unrolled_share: float = 0.0
    hidden_state_noise: float = 0.0
    target_temperature: float = 1.0
    target_top_k: int | None = None
    chunk_elements: int = field(default=CHUNK_ELEMENTS, repr=False)

    @property
    def needs_distribution(self) -> bool:
        """Whether the base model's distribution is needed at every position of every head."""
        return any(name in DISTRIBUTION_LOSSES for name in self.losses)

    @property
    def needs_choices(self) -> bool:
        """Whether the base model's most probable tokens are needed."""
        return any(name in CHOICE_LOSSES for name in self.losses)

    def __call__(
        self,
        speculator: Cell,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        next_states: torch.Tensor | None = None,
        base_logits=None,
        training: bool = False,
        divisor: torch.Tensor | None = None,
    ) -> ObjectiveOutput:
        """The training forward: the same heads as `MLPSpeculatorPreTrainedModel.forward`, without keeping logits.

        Args:
            hidden_states, input_ids, labels: as there.
            next_states: (batch, n + n_predict - 1, emb_dim), `next_states[:, i + j]` the context vector that the base
                model draws head `i`'s target at position `j` from; for losses on its distribution.
            base_logits: from such vectors (..., emb_dim) to the base model's logits (..., vocab).
            training: whether the heads are fed as in training.
            divisor: (n_predict,), what the sums of losses are divided by; by default the positions that count here.
        """
        batch, n, _ = hidden_states.shape
        if training and self.hidden_state_noise:
            size = hidden_states.float().square().mean(-1, keepdim=True).sqrt() * self.hidden_state_noise
            hidden_states = hidden_states + (torch.randn_like(hidden_states) * size).to(hidden_states.dtype)
        state, tokens = speculator.first_state(hidden_states), input_ids[:, :n]
        choices = self._choices(next_states, base_logits) if self.needs_choices else None
        sums, observed = [], []
        n_predict = len(self.top_k)
        for head in range(n_predict):
            state, here = speculator.advance(head, state, tokens), slice(head, head + n)
            lm_head, ids = speculator.draft_head(head)
            score = partial(
                self._score,
                top_k=self.top_k[head],
                ids=ids,
                labels=labels[:, here].flatten(),
                choices=None if choices is None else choices[:, here].flatten(),
                next_states=next_states[:, here].flatten(0, 1) if self.needs_distribution else None,
                base_logits=base_logits,
            )
            features = speculator.features(state).flatten(0, 1)
            loss, values = chunked_linear(lm_head, features, score, self.chunk_elements)
            sums.append(loss)
            observed.append(values.view(batch, n, 4))
            tokens = input_ids[:, head + 1 : head + 1 + n]
            if training and self.unrolled_share and head + 1 < n_predict:
                own = torch.rand(tokens.shape, device=tokens.device) < self.unrolled_share
                tokens = torch.where(own, observed[-1][:, :, 3].long(), tokens)
        counted = counted_labels(labels, n_predict)
        divisor = counted.sum(0) if divisor is None else divisor
        divisor = divisor.clamp(min=torch.finfo(torch.float32).tiny)
        losses = torch.stack(sums) / divisor
        loss = sum(weight * loss for weight, loss in zip(self.head_weights, losses.unbind(), strict=True))
        for states in speculator.next_token_states:
            summed = self._next_token_loss(speculator, states[:, -n:], input_ids[:, :n], labels[:, :n])
            loss = loss + summed / divisor[0]
        row_losses, correct, correct_top_k, _ = torch.stack(observed).sum(2).unbind(-1)  # (n_predict, batch)
        return ObjectiveOutput(loss, losses, row_losses.T, correct.T, correct_top_k.T, counted)

    def _next_token_loss(
        self, speculator: Cell, states: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """The summed cross-entropy of the tokens drawn from states, where head 0 counts, which guesses those after."""
        targets = input_ids.masked_fill(labels == -100, -100).flatten()

        def score(logits: torch.Tensor, at: slice) -> tuple[torch.Tensor, torch.Tensor]:
            losses = F.cross_entropy(logits, targets[at], reduction="none", ignore_index=-100)
            return losses.sum(), losses.detach()[:, None]

        return chunked_linear(speculator.lm_head(0), states.flatten(0, 1), score, self.chunk_elements)[0]

    @torch.no_grad()
    def _choices(self, next_states: torch.Tensor, base_logits) -> torch.Tensor:
        """The base model's most probable token after each state: (batch, n, emb_dim) -> (batch, n)."""
        states = next_states.flatten(0, 1)
        vocab_size = base_logits(states[:1]).shape[-1]
        parts = states.split(max(1, self.chunk_elements // vocab_size))
        return torch.cat([base_logits(part).argmax(-1) for part in parts]).view(next_states.shape[:2])

    def _score(self, logits, at, top_k, ids, labels, choices, next_states, base_logits):
        """The sum of losses of a chunk; of each position the loss, if the head is right, drafts it, its choice.

        Args:
            ids: of the tokens that are scored; None for all. A target that can't be drafted adds nothing.
        """
        ignored, labels = labels[at] == -100, _places(labels[at], ids)
        choices = None if choices is None else _places(choices[at], ids)
        with torch.no_grad():
            theirs = self._target(base_logits(next_states[at]).float(), ids) if self.needs_distribution else None
            choice = logits.argmax(-1)
            truth = logits.gather(1, labels.clamp(min=0)[:, None])
            drafted = ((logits > truth).sum(-1) < top_k) & (labels != -100)
        losses = mixed(self.losses, self.loss_weights, logits, labels, theirs, choices).masked_fill(ignored, 0.0)
        own = choice if ids is None else ids[choice]
        # A token is exact in float32, up to 2^24.
        values = [losses.detach(), (choice == labels).float(), drafted.float(), own.float()]
        return losses.sum(), torch.stack(values, dim=-1)

    def _target(self, logits: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        """The base model's logits (positions, vocab) of what can be drafted, warped as `generate` does to sample."""
        logits = TemperatureLogitsWarper(self.target_temperature)(None, logits if ids is None else logits[:, ids])
        return logits if self.target_top_k is None else TopKLogitsWarper(self.target_top_k)(None, logits)


def counted_labels(labels: torch.Tensor, n_predict: int) -> torch.Tensor:
    """How many positions of each row count for each head: (batch, n + n_predict - 1) -> (batch, n_predict)."""
    n = labels.shape[1] - n_predict + 1
    return (labels != -100).unfold(1, n, 1).sum(-1)


def _places(tokens: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """Where tokens (...) are among ids (n,) in ascending order; -100 where they are not."""
    if ids is None:
        return tokens
    places = torch.searchsorted(ids, tokens).clamp(max=len(ids) - 1)
    return torch.where(ids[places] == tokens, places, -100)
