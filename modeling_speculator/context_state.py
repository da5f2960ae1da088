"""The keys and values of a context layer in one call, and between two calls that share a cache."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cache import SpeculativeCache
from .context_layer import ContextLayer
from .drafter_state import Call, DrafterState, Prompt, at_nodes
from .verification import Verified


@dataclass
class Remembered:
    """What a call knew of the tokens in a cache that it handed back.

    Attributes:
        layer: that computed it.
        tokens: (batch, columns), the token after each column of the cache; -1 where that is not known.
        keys, values: (batch, heads, columns, head_dim).
        known: (batch, columns) bool.
    """

    layer: weakref.ref
    tokens: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    known: torch.Tensor


PROMPT_PART = 1024  # columns of a prompt that are computed at once
_remembered: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by the cache of transformers


class ContextState(DrafterState):
    """Pairs lie where their context vectors lie in the cache's columns, and grow by verified ones only.

    A step writes a pair for every token that it may have emitted. Those beyond what it did emit are attended to by
    none that counts, for these come before them, and the next step writes over them.

    Args:
        layer: of the drafter.
        embed: from tokens (...) to their embeddings (..., width).
        feature_layers: of the base model.
    """

    STATE = ("context_vector", "keys", "values", "known", "offsets", "columns", "rows", "along")

    def __init__(self, layer: ContextLayer, embed: Callable, feature_layers: tuple[int, ...], call: Call):
        self.layer, self.embed, self.feature_layers = layer, embed, feature_layers
        dtype, device = layer.dtype, call.context_vector.device
        batch = len(call.context_vector)
        self.context_vector = torch.zeros(batch, 1, layer.width, dtype=dtype, device=device)
        heads, head_dim = layer.key_shape
        shape = batch, heads, call.capacity, head_dim
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.offsets = call.offsets.clone()
        self.columns = torch.arange(call.capacity, device=device)
        self.rows = torch.arange(batch, device=device)[:, None]
        self.along = self.columns.clone()
        self.known = torch.ones(batch, call.capacity, dtype=torch.bool, device=device)
        self.past = None if call.past is None else _remembered.pop(call.past, None)
        self.past_tokens = None

    def prefill(self, prompt: Prompt, cache: SpeculativeCache) -> None:
        first, end = prompt.first_column, prompt.tokens.shape[1]
        self.known[:, :end] = prompt.known
        self._recall(prompt)
        # Part after part, as all of a long prompt would need a mask of its length squared.
        for at in range(first, end, PROMPT_PART):
            part = slice(at, min(at + PROMPT_PART, end))
            columns = self.columns[None, part].expand(len(self.keys), -1)
            tokens = prompt.tokens[:, part].clamp(min=0)
            context_vectors = self._advance(cache, columns - first, tokens, columns, part.stop)
        self.context_vector.copy_(context_vectors[:, -1:])

    def extend(self, verified: Verified, cache: SpeculativeCache, root_column: torch.Tensor) -> None:
        along = self.along[: verified.tokens.shape[1]]
        tokens = torch.where(along < verified.n_tokens[:, None], verified.tokens, 0)
        context_vectors = self._advance(cache, verified.nodes, tokens, root_column + along, cache.slots.in_use)
        last = at_nodes(context_vectors, verified.last)
        self.context_vector.copy_(torch.where(verified.n_tokens[:, None, None] > 0, last, self.context_vector))

    def _advance(
        self,
        cache: SpeculativeCache,
        nodes: torch.Tensor,
        tokens: torch.Tensor,
        columns: torch.Tensor,
        end: int,
    ) -> torch.Tensor:
        """Writes pairs at columns (batch, n), of nodes (batch, n) of the forward, and returns what comes of them,
        (batch, n, width). No column that counts is as high as `end`."""

        def caught(layer: int | None) -> torch.Tensor:
            return at_nodes(cache.caught[layer], nodes).to(self.keys.device)

        features = torch.cat([caught(layer) for layer in self.feature_layers], -1) if self.feature_layers else None
        hidden_states = caught(None)
        positions = columns + self.offsets
        stream, query, key, value = self.layer.read(hidden_states, self.embed(tokens), features, positions)
        for storage, new in ((self.keys, key), (self.values, value)):
            new = new.to(storage.dtype)  # under autocast it is of another
            if len(columns) == 1:
                storage.index_copy_(2, columns[0], new)
            else:
                storage[self.rows, :, columns] = new.transpose(1, 2)
        mask = self.known[:, None, :end] & (self.columns[:end] <= columns[:, :, None])
        # A column that is not known attends to itself alone: to nothing at all, it would be NaN.
        mask = mask | (self.columns[:end] == columns[:, :, None])
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        return self.layer.attend(hidden_states, stream, query.to(keys.dtype), keys, values, mask[:, None])

    # Between calls

    def remember(self, cache, tokens: torch.Tensor, lengths: torch.Tensor, in_cache_only: int) -> None:
        columns = tokens.shape[1] - 1 + in_cache_only  # of the cache
        after = tokens.new_full((len(tokens), columns), -1)
        if self.past_tokens is not None:
            after[:, : self.past_tokens.shape[1]] = self.past_tokens
        start = max(0, in_cache_only - 1)
        after[:, start:] = tokens[:, start + 1 - in_cache_only :]
        known = self.known[:, :columns] & (self.columns[:columns] < lengths + in_cache_only - 1)
        keys, values = self.keys[:, :, :columns].clone(), self.values[:, :, :columns].clone()
        _remembered[cache] = Remembered(weakref.ref(self.layer), after, keys, values, known)

    def _recall(self, prompt: Prompt) -> None:
        """Takes over what is known of the columns that were in the caller's cache already, as far as the text and the
        mask are those of then: what comes after another token was computed from another text."""
        past, first, self.past = self.past, prompt.first_column, None
        known = self.known[:, :first]
        fits = past is not None and past.layer() is self.layer and len(past.tokens) == len(known)
        if not fits or past.tokens.shape[1] < first:
            known[:] = False
            return
        self.keys[:, :, :first], self.values[:, :, :first] = past.keys[:, :, :first], past.values[:, :, :first]
        self.past_tokens, tokens = past.tokens[:, :first], prompt.tokens[:, :first]
        mask = prompt.mask[:, :first]
        same = (tokens == self.past_tokens) | (tokens < 0) | ~mask
        known[:] = past.known[:, :first] & mask & same.cumprod(-1).bool()


__all__ = ["ContextState"]
