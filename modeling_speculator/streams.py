"""Streams in the upper layers of a base model: what they are, and along a text at all places at once.

Stream j of a place attends to what its place attends to and to the streams <= j of that; no other place attends to it.
Its rotary position is its place's (arXiv 2402.11131, section 3.1).
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from .context_vectors import mask_of_text
from .families import attention_windows
from .guests import Guest, guests_allowed, received
from .stream_adapters import key_of
from .transformers_api import CACHE


# Along a text: rows of streams that run at once, and what may be kept for a backward before it is computed again.
LEAST_ROWS, KEPT_BYTES = 256, 2**32
_VALUES_KEPT = 32  # in a layer for each row, in hidden sizes
Masks = torch.Tensor | dict[str, torch.Tensor]  # as a decoder takes them: one, or one for each type of layer


@dataclass
class Streams:
    """What they start from, and what is different for them.

    Attributes:
        embeddings: (streams of a place, hidden_size), added to the main stream's state.
        first_layer: of the base model, that they run through.
        adapters: by layer from that one on, and by `key_of` the name of a linear layer, what is added to its output.
        names: of the linear layers with an adapter, the same in each layer.
        adapt_main: whether the adapters act on the main stream, too, along a text.
    """

    embeddings: torch.Tensor
    first_layer: int
    adapters: Sequence[nn.ModuleDict]
    names: Sequence[str]
    adapt_main: bool = False

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def adapted(self) -> tuple[tuple[int, str], ...]:
        """The linear layers with an adapter: of which layer of the base model, under which name."""
        return tuple((self.first_layer + at, name) for at in range(len(self.adapters)) for name in self.names)

    def starting_at(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, n, hidden_size) -> (batch, n * streams, hidden_size), those of a place one after the other."""
        return (states[:, :, None] + self.embeddings.to(states.device, states.dtype)).flatten(1, 2)

    def adapts(self, layer: int, name: str) -> bool:
        """Whether it has an adapter for a linear layer: another thread's guest may have one where this has none."""
        return 0 <= layer - self.first_layer < len(self.adapters) and name in self.names

    def adapt(
        self, layer: int, name: str, inputs: torch.Tensor, outputs: torch.Tensor, batch: int, rows: int, first: int = 0
    ) -> torch.Tensor:
        """A linear layer's outputs, with what an adapter adds to those of rows from a `first` one on.

        Args:
            inputs, outputs: (batch, rows, ...), or (batch * rows, ...), as some layers see them.

        Raises:
            ValueError: for other shapes, whose rows nobody knows.
        """
        if inputs.shape[:-1] not in ((batch, rows), (batch * rows,)):
            raise ValueError(
                f"{name} is given {tuple(inputs.shape)} numbers, not those of {rows} rows: set "
                "`stream_lora_rank: 0` for a base model of this family."
            )
        adapter = self.adapters[layer - self.first_layer][key_of(name)]
        inputs, apart = inputs.reshape(batch, rows, -1), outputs.reshape(batch, rows, -1)
        added = adapter(inputs[:, first:]).to(outputs.device, outputs.dtype)
        return torch.cat([apart[:, :first], apart[:, first:] + added], dim=1).view(outputs.shape)

    def own_mask(self, n: int, columns: int, device: torch.device) -> torch.Tensor:
        """(n * streams, columns) bool: which of the streams of n places each attends to."""
        rows, others = torch.arange(n * len(self), device=device)[:, None], torch.arange(columns, device=device)
        return (rows // len(self) == others // len(self)) & (others <= rows)


# Along a text


@dataclass
class _UpperLayers(Guest):
    """A forward through the upper layers alone, over rows that are given: the lower ones see a single row."""

    first_layer: int
    rows: torch.Tensor
    streams: Streams | None = None  # those whose adapters act on all rows

    def enter(self, layer: int, inputs: dict) -> None:
        if layer == self.first_layer:
            inputs["hidden_states"] = self.rows
        elif layer < self.first_layer:
            inputs["hidden_states"] = inputs["hidden_states"][:, :1]
            inputs["attention_mask"] = inputs["attention_mask"][:, :, :1, :1]
            for name in ("position_ids", "position_embeddings"):
                if inputs.get(name) is not None:
                    inputs[name] = changed(inputs[name], lambda values: values[:, :1])

    def adapt(self, layer: int, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        if self.streams is None or not self.streams.adapts(layer, name):
            return outputs
        return self.streams.adapt(layer, name, inputs, outputs, *self.rows.shape[:2])


class _MainStream(DynamicLayer):
    """Keys and values of the first forward, whose first `n_seen` all others attend to beside their own."""

    n_seen = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            return key_states, value_states
        keys, values = self.keys[:, :, : self.n_seen], self.values[:, :, : self.n_seen]
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


class _Nothing(DynamicLayer):
    """Keeps no keys."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        return key_states, value_states


def read_streams(
    base_model, streams: Streams, states: torch.Tensor, segments: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes out of the streams of all places of a text, after the base model's final norm, and of the main one.

    The main stream runs through the upper layers first, without a gradient unless it has adapters, too; then the
    streams of some places at a time.

    Args:
        states: (batch, n, hidden_size), what enters the streams' first layer.
        segments: (batch, n), a number for each document, and for padding; None where each row is one text.

    Returns:
        (batch, n, streams * hidden_size), those of a place one after the other; and (batch, n, hidden_size).
    """
    config = base_model.config.get_text_config(decoder=True)
    states = states.to(base_model.dtype)
    batch, n, width = states.shape
    first, places = streams.first_layer, torch.arange(n, device=states.device)
    cache = Cache(layers=[_Nothing() if at < first else _MainStream() for at in range(config.num_hidden_layers)])
    main = {kind: mask_of_text(places, window, segments) for kind, window in attention_windows(config).items()}

    def through_upper_layers(guest: _UpperLayers, positions: torch.Tensor, masks: dict) -> torch.Tensor:
        masks = {kind: _additive(mask, states.dtype) for kind, mask in masks.items()}
        rows = guest.rows.shape[1]
        with (
            guests_allowed(base_model, streams.adapted),
            received(guest),
            frozen(base_model),
            torch.autocast(states.device.type, enabled=False),
        ):
            outputs = base_model.get_decoder()(
                input_ids=torch.zeros(batch, rows, dtype=torch.long, device=states.device),
                attention_mask=masks[None] if None in masks else masks,
                position_ids=positions.expand(batch, -1),
                use_cache=True,
                **{CACHE: cache},
            )
        return outputs.last_hidden_state

    def of_places(here: torch.Tensor, n_seen: int) -> torch.Tensor:
        """Consecutive places (m,), the last of which sees `n_seen` -> (batch, m, streams * hidden_size)."""
        for layer in cache.layers:
            layer.n_seen = n_seen
        own = streams.own_mask(len(here), len(here) * len(streams), states.device)
        masks = {}
        for kind, mask in main.items():
            seen = mask[:, :, here, :n_seen].repeat_interleave(len(streams), dim=2)
            masks[kind] = torch.cat([seen, own.expand(len(seen), 1, -1, -1)], dim=3)
        guest = _UpperLayers(first, streams.starting_at(states[:, here]), streams)
        leaving = through_upper_layers(guest, here.repeat_interleave(len(streams))[None], masks)
        return leaving.view(batch, len(here), -1)

    adapting = streams if streams.adapt_main else None
    with nullcontext() if streams.adapt_main else torch.no_grad():
        main_states = through_upper_layers(_UpperLayers(first, states, adapting), places[None], main)
    rows = max(LEAST_ROWS, n * len(streams) // 8)  # the shorter a part, the less it sees that comes after it
    kept_of_row = batch * (config.num_hidden_layers - first) * _VALUES_KEPT * width * states.element_size()
    is_large = n * len(streams) * kept_of_row > KEPT_BYTES
    if is_large and torch.is_grad_enabled():  # computed again for the backward, one part at a time
        rows = min(rows, KEPT_BYTES // kept_of_row)
    leaving, end = [], 0
    for part in places.split(max(1, rows // len(streams))):
        end += len(part)
        if is_large and torch.is_grad_enabled():
            leaving.append(checkpoint(of_places, part, end, use_reentrant=False))
        else:
            leaving.append(of_places(part, end))
    return torch.cat(leaving, dim=1), main_states


_freezing = threading.Lock()
_frozen_now: WeakKeyDictionary = WeakKeyDictionary()  # by base model: how many want it, and what was trainable


@contextmanager
def frozen(base_model) -> Iterator[None]:
    """The base model is not ours to train: its weights get no gradient from what runs meanwhile."""
    if not torch.is_grad_enabled():
        yield
        return
    with _freezing:
        users, trainable = _frozen_now.get(base_model) or (0, [w for w in base_model.parameters() if w.requires_grad])
        _frozen_now[base_model] = users + 1, trainable
        for weight in trainable:
            weight.requires_grad_(False)
    try:
        yield
    finally:
        with _freezing:
            users, trainable = _frozen_now.pop(base_model)
            if users > 1:
                _frozen_now[base_model] = users - 1, trainable
            else:  # the last one gives them back
                for weight in trainable:
                    weight.requires_grad_(True)


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def changed(values, change):
    """Positions of all rows (batch, rows, ...), or a tuple of such, changed."""
    return tuple(map(change, values)) if isinstance(values, tuple) else change(values)


__all__ = ["Streams", "changed", "frozen", "read_streams"]
