"""The base model's keys and values, in slots that are allocated once and reused.

A rotated key or a learned position carries its position with it, so the order of keys in memory is free. Rejected
nodes therefore leave holes that the next step writes into, and nothing is ever moved: a step costs no copy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .candidate_tree import CandidateTree
from .transformers_api import empty_cache


@dataclass
class Slots:
    """Where all layers of a cache write next.

    capacity: slots per row.
    nodes: (batch, nodes), the slot of each node of this step; None during the prefill.
    kept: (batch, n), the nodes of this step that these are; None where they are all.
    rows: (batch, 1), the index of each row.
    in_use: slots that this step's attention looks at.
    """

    capacity: int
    nodes: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    in_use: int = 0


class SpeculativeLayer(CacheLayerMixin):
    """Keys and values of one layer: (batch, kv_heads, capacity, head_dim), written where its slots say.

    Args:
        slots: shared by all layers.
        past: the layer of an earlier call's cache to go on from; it is copied.
        storage: keys and values of an earlier call, which nobody uses any more.
        guest_slots: before all others, for rows of a guest in a step's forward; nothing of them is kept.
    """

    is_sliding = False  # a window is a matter of the mask: what it hides stays stored

    def __init__(
        self,
        slots: Slots,
        past: CacheLayerMixin | None = None,
        storage: tuple = (None, None),
        guest_slots: int = 0,
    ):
        super().__init__()
        self.storage, self.guest_slots = storage, guest_slots
        self.slots = slots  # not the cache: a cycle would keep the memory until Python collects it
        self.length = 0  # tokens written before the first step
        if past is not None and past.is_initialized:
            self.lazy_initialization(past.keys, past.values)
            self.length = int(past.get_seq_length())
            # Of a layer with a window the oldest are gone, and of a static one the rest is empty.
            stored = min(self.length, past.keys.shape[2])
            end = guest_slots + self.length
            self.keys[:, :, end - stored : end] = past.keys[:, :, :stored]
            self.values[:, :, end - stored : end] = past.values[:, :, :stored]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def allocate(like: torch.Tensor, storage: torch.Tensor | None) -> torch.Tensor:
            # Zeros: attention multiplies the values of unused slots by 0, and memory as it comes may hold NaN.
            shape = (*like.shape[:2], self.guest_slots + self.slots.capacity, like.shape[-1])
            if storage is None or (storage.shape, storage.dtype, storage.device) != (shape, like.dtype, like.device):
                return like.new_zeros(shape)
            return storage.zero_()

        keys, values = self.storage
        self.keys, self.values = allocate(key_states, keys), allocate(value_states, values)
        self.storage, self.is_initialized = (None, None), True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes (batch, kv_heads, nodes, head_dim) and returns views of all the slots that are in use.

        Where there are more rows than nodes, the others are a guest's, and its slots come first in the views.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.slots.nodes is None:  # prefill: the tokens of the prompt, one after another
            start, self.length = self.length, self.length + key_states.shape[2]
            first, start, end = self.guest_slots, start + self.guest_slots, self.length + self.guest_slots
            self.keys[:, :, start:end] = key_states
            self.values[:, :, start:end] = value_states
            return self.keys[:, :, first:end], self.values[:, :, first:end]
        n_nodes = self.slots.nodes.shape[1]
        n_guests = key_states.shape[2] - n_nodes
        if n_guests:
            self.keys[:, :, :n_guests] = key_states[:, :, n_nodes:]
            self.values[:, :, :n_guests] = value_states[:, :, n_nodes:]
            key_states, value_states = key_states[:, :, :n_nodes], value_states[:, :, :n_nodes]
        self._write(self.keys, key_states)
        self._write(self.values, value_states)
        seen = slice(0 if n_guests else self.guest_slots, self.guest_slots + self.slots.in_use)
        return self.keys[:, :, seen], self.values[:, :, seen]

    def _write(self, storage: torch.Tensor, states: torch.Tensor) -> None:
        rows, nodes = self.slots.rows, self.slots.nodes
        if self.guest_slots:
            nodes = nodes + self.guest_slots
        if storage.device != nodes.device:  # a model spread over several
            rows, nodes = rows.to(storage.device), nodes.to(storage.device)
        if len(nodes) == 1:  # half the time of the general case
            storage.index_copy_(2, nodes[0], states)
        else:
            storage[rows, :, nodes] = states.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.slots.capacity


class CatchesStates:
    """What a cache takes from the forwards that use it.

    Attributes:
        caught: what the last one has made, (batch, tokens, hidden_size): what entered some layers, by their number,
            and what the decoder returned, by None.
        keeps_prompt: whether what all forwards of the prefill make is wanted, and not of the last one only.
    """

    def catch_nothing(self, keeps_prompt: bool) -> None:
        """At the beginning."""
        self.caught, self.keeps_prompt = {}, keeps_prompt
        self.parts: dict[int | None, list[torch.Tensor]] = {}  # of the prefill, by forward

    @property
    def is_prefill(self) -> bool:
        raise NotImplementedError

    @property
    def context_vectors(self) -> torch.Tensor:
        """(batch, nodes, hidden_size), of the forward that used this cache."""
        return self.caught[None]

    def catch(self, layer: int | None, hidden_states: torch.Tensor) -> None:
        """Takes what a forward has made; of a prompt in several parts, all of it."""
        if self.keeps_prompt and self.is_prefill:
            self.parts.setdefault(layer, []).append(hidden_states)
        self.caught[layer] = hidden_states

    def join_parts(self) -> None:
        """Ends the prefill."""
        for layer in list(self.parts):
            self.caught[layer] = torch.cat(self.parts.pop(layer), dim=1)


class SpeculativeCache(CatchesStates, Cache):
    """A preallocated cache in which every row of the batch has a length of its own.

    Use: run the prefill, call `start_steps`, then for every step `prepare_step`, a forward of the base model, `keep`.

    Attributes:
        caught: what the forward that used this cache has made, (batch, nodes, hidden_size): what entered some layers,
            by their number, and what the decoder returned, by None.

    Args:
        n_layers: layers of the base model.
        capacity: slots per row: prompt, tokens to generate and the nodes of one tree.
        windows: the masks that the base model expects, from `attention_windows`.
        past: the cache of an earlier call.
        storage: keys and values of each layer of an earlier call, which nobody uses any more; or none.
        keeps_prompt: whether what all forwards of the prefill have made is wanted, and not of the last one only.
        guest_slots: of each layer that takes a guest's rows, slots for these.
    """

    def __init__(
        self,
        n_layers: int,
        capacity: int,
        windows: dict[str | None, int | None],
        past: Cache | None = None,
        storage: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
        keeps_prompt: bool = False,
        guest_slots: Mapping[int, int] = MappingProxyType({}),
    ):
        self.slots = Slots(capacity)
        self.catch_nothing(keeps_prompt)
        self.windows = windows
        layers = [] if past is None else past.layers  # of an empty `DynamicCache()` there are none
        super().__init__(
            layers=[
                SpeculativeLayer(
                    self.slots,
                    layers[index] if index < len(layers) else None,
                    storage[index] if index < len(storage) else (None, None),
                    guest_slots.get(index, 0),
                )
                for index in range(n_layers)
            ]
        )

    def start_steps(self, attention_mask: torch.Tensor, max_nodes: int, dense: bool = False) -> None:
        """Ends the prefill.

        Args:
            attention_mask: (batch, prompt), 0 at padding.
            max_nodes: the most nodes of a step.
            dense: whether every slot in use is attended to by every node: one node per step, no padding, no window.
        """
        batch, length = attention_mask.shape
        device = attention_mask.device
        self.join_parts()
        self.slots.rows = torch.arange(batch, device=device)[:, None]
        # The column of the text that each slot's key stands for, -1 where it is padding, empty or was rejected.
        # Windows count columns, padding and all, as the masks of transformers do.
        self.columns = torch.full((batch, self.slots.capacity), -1, device=device)
        self.columns[:, :length] = torch.where(attention_mask.bool(), torch.arange(length, device=device), -1)
        # The next `max_nodes` free slots of each row, and the first slot that no row has ever used.
        self.free = length + torch.arange(max_nodes, device=device).repeat(batch, 1)
        self.frontier = torch.full((batch, 1), length + max_nodes, device=device)
        self.prompt_length = length
        self.dense = dense
        self.along = torch.arange(max_nodes, device=device)
        dtype = self.layers[0].keys.dtype
        self.attend = torch.zeros((), dtype=dtype, device=device)
        self.ignore = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)

    @property
    def is_prefill(self) -> bool:
        return self.slots.nodes is None

    def prepare_step(
        self, tree: CandidateTree, root_column: torch.Tensor, in_use: int
    ) -> torch.Tensor | dict[str, torch.Tensor | None] | None:
        """Gives this step's nodes their slots and returns what each of them attends to.

        Args:
            root_column: (batch, 1), of each row's root.
            in_use: the highest `frontier` of all rows.

        Returns:
            (batch, 1, nodes, in_use), 0 where a node attends to a slot, else the lowest number of the keys' dtype.
            To be added to the scores, for eager attention takes no other mask, and sdpa turns others into this one.
            A dict of them where layers differ; None for each where the cache is dense.
        """
        nodes = tree.depths.shape[1]
        slots = self.slots.nodes = self.free[:, :nodes]
        self.slots.kept, self.slots.in_use = None, in_use
        masks = dict.fromkeys(self.windows)
        if not self.dense:
            attends = (self.columns[:, :in_use] >= 0)[:, None].repeat(1, nodes, 1)
            attends.scatter_(2, slots[:, None].expand(-1, nodes, -1), tree.ancestors)
            for kind, window in self.windows.items():
                allowed = attends
                if window is not None and window < in_use:
                    column = root_column + tree.depths  # (batch, nodes)
                    columns = self.columns[:, :in_use].scatter(1, slots, column)
                    allowed = attends & (columns[:, None] > column[:, :, None] - window)
                masks[kind] = torch.where(allowed, self.attend, self.ignore)[:, None]
        return masks[None] if None in masks else masks

    def leave_out_but(self, kept: torch.Tensor) -> None:
        """In the layers that come next in this step's forward there are only some nodes (batch, n) in ascending order,
        which are then numbered by their place in it."""
        self.slots.kept, self.slots.nodes = kept, self.slots.nodes.gather(1, kept)

    def keep(self, nodes: torch.Tensor, n_kept: torch.Tensor, root_column: torch.Tensor) -> None:
        """Keeps the first `n_kept` (batch,) of `nodes` (batch, max_depth + 1), a path, and frees all other nodes.

        Args:
            root_column: (batch, 1), of the path's first node.
        """
        if len(self.along) == 1:  # roots only: their slots follow one another
            self.columns.scatter_(1, self.free, torch.where(n_kept[:, None] > 0, root_column, -1))
            self.free.add_(n_kept[:, None])
            return
        # Beyond the kept ones the last of them is written again, so that every write to a place is the same.
        along = torch.minimum(self.along[: nodes.shape[1]], (n_kept[:, None] - 1).clamp(min=0))
        nodes = nodes.gather(1, along)
        slots = self.slots.nodes.gather(1, nodes)
        kept = n_kept[:, None] > 0
        if self.slots.kept is not None:
            nodes = self.slots.kept.gather(1, nodes)  # as they were numbered before
        self.columns.scatter_(1, slots, torch.where(kept, root_column + along, -1))
        self.free.scatter_(1, nodes, torch.where(kept, self.frontier + along, slots))
        self.frontier.add_(n_kept[:, None])

    def copy_to(self, cache: Cache, length: int, release: bool) -> Cache:
        """Fills a cache of transformers with the keys and values of the first `length` columns, in their order.

        Args:
            length: rows must have all of these columns.
            release: whether to free each layer once it is copied, so that memory never holds both caches.
        """
        columns = torch.where(self.columns < self.prompt_length, length, self.columns).clamp(max=length)
        slots = self.columns.new_zeros(len(columns), length + 1)  # one too many, for slots that are not wanted
        slots.scatter_(1, columns, torch.arange(self.slots.capacity, device=slots.device).expand_as(columns))
        slots[:, : self.prompt_length] = torch.arange(self.prompt_length, device=slots.device)  # never moved
        slots = slots[:, :length]
        empty_cache(cache)
        for index, layer in enumerate(self.layers):
            if not layer.is_initialized:  # it attends to keys of another one
                continue
            rows, ordered = self.slots.rows.to(layer.keys.device), slots.to(layer.keys.device) + layer.guest_slots
            keys, values = layer.keys[rows, :, ordered], layer.values[rows, :, ordered]
            if release:
                layer.keys = layer.values = None
            cache.update(keys.transpose(1, 2), values.transpose(1, 2), index)
        return cache
