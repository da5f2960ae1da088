"""What the drafted pairs of EAGLE attend to: the true ones before them, in a call or along a text."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cache import SpeculativeCache
from .context_state import ContextState
from .drafter_state import Call, Prompt
from .verification import Verified


@dataclass
class Seen:
    """True pairs, as drafts see them that start at some places.

    keys, values: (batch, kv_heads, pairs, head_dim).
    mask: (batch or 1, n or 1, pairs) bool.
    positions: (batch or 1, n or 1), of the last pair that each sees.
    """

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


@dataclass
class SeenInText:
    """The pairs of texts, of which each place sees those before, and its own.

    keys, values: (batch, kv_heads, length, head_dim).
    mask: (batch or 1, length, length) bool.
    """

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor

    def by(self, n: int) -> Seen:
        """What the last n places see."""
        length = self.keys.shape[2]
        positions = torch.arange(length - n, length, device=self.keys.device)[None]
        return Seen(self.keys, self.values, self.mask[:, length - n :], positions)

    def between(self, start: int, end: int, n: int) -> "SeenAtPlaces":
        """What some places of all rows see, counted among the last n."""
        first = self.keys.shape[2] - n
        positions = torch.arange(first + start, first + end, device=self.keys.device)[None]
        return SeenAtPlaces(Seen(self.keys, self.values, self.mask[:, first + start : first + end], positions))

    def at(self, rows: torch.Tensor, places: torch.Tensor, n: int) -> "SeenAtPlaces":
        """What single places (m,) of rows (m,) see, counted among the last n of each."""
        places = places + self.keys.shape[2] - n
        mask = self.mask.expand(len(self.keys), -1, -1)[rows, places][:, None]
        return SeenAtPlaces(Seen(self.keys[rows], self.values[rows], mask, places[:, None]))


@dataclass
class SeenAtPlaces:
    """What single places see, whatever is drafted at each."""

    seen: Seen

    def by(self, n: int) -> Seen:
        return self.seen


class EagleState(ContextState):
    """A `ContextState` that drafts read, too: those of a row see its pairs up to the last verified one."""

    STATE = (*ContextState.STATE, "last_column")

    def __init__(self, layer, embed: Callable, feature_layers: tuple[int, ...], call: Call):
        super().__init__(layer, embed, feature_layers, call)
        self.last_column = torch.zeros_like(self.rows)
        self.n_columns = call.capacity

    def prefill(self, prompt: Prompt, cache: SpeculativeCache) -> None:
        super().prefill(prompt, cache)
        self.last_column.fill_(prompt.tokens.shape[1] - 1)

    def extend(self, verified: Verified, cache: SpeculativeCache, root_column: torch.Tensor) -> None:
        super().extend(verified, cache, root_column)
        last = root_column + verified.n_tokens[:, None] - 1
        self.last_column.copy_(torch.where(verified.n_tokens[:, None] > 0, last, self.last_column))

    def within(self, columns: int) -> None:
        self.n_columns = columns

    def by(self, n: int) -> Seen:
        """What any number of drafts of each row see."""
        seen = slice(0, self.n_columns)
        columns = self.columns[seen]
        mask = (self.known[:, seen] & (columns <= self.last_column)) | (columns == self.last_column)
        return Seen(self.keys[:, :, seen], self.values[:, :, seen], mask[:, None], self.last_column + self.offsets)


__all__ = ["EagleState", "SeenInText"]
