"""The base model's keys and values, in slots that are allocated once and reused.

A rotated key or a learned position carries its position with it, so the order of keys in memory is free. Rejected
nodes therefore leave holes that the next step writes into, and nothing is ever moved: a step costs no copy.
"""

from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin


@dataclass
class Slots:
    """Where all layers of a cache write next.

    capacity: slots per row.
    nodes: (batch, nodes), the slot of each node of this step; None during the prefill.
    rows: (batch, 1), the index of each row.
    in_use: slots that this step's attention looks at.
    """

    capacity: int
    nodes: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    in_use: int = 0


class SpeculativeLayer(CacheLayerMixin):
    """Keys and values of one layer: (batch, kv_heads, capacity, head_dim), written where its slots say."""

    is_sliding = False

    def __init__(self, slots: Slots):
        super().__init__()
        self.slots = slots  # not the cache: a cycle would keep the memory until Python collects it
        self.length = 0  # tokens written by the prefill

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def allocate(like: torch.Tensor) -> torch.Tensor:
            # Zeros: attention multiplies the values of unused slots by 0, and memory as it comes may hold NaN.
            return like.new_zeros(*like.shape[:2], self.slots.capacity, like.shape[-1])

        self.keys, self.values = allocate(key_states), allocate(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes (batch, kv_heads, nodes, head_dim) and returns views of all the slots that are in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.slots.nodes is None:  # prefill: the tokens of the prompt, one after another
            start, self.length = self.length, self.length + key_states.shape[2]
            self.keys[:, :, start : self.length] = key_states
            self.values[:, :, start : self.length] = value_states
            return self.keys[:, :, : self.length], self.values[:, :, : self.length]
        in_use = self.slots.in_use
        self._write(self.keys, key_states)
        self._write(self.values, value_states)
        return self.keys[:, :, :in_use], self.values[:, :, :in_use]

    def _write(self, storage: torch.Tensor, states: torch.Tensor) -> None:
        rows, nodes = self.slots.rows, self.slots.nodes
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


class SpeculativeCache(Cache):
    """A preallocated cache in which every row of the batch has a length of its own.

    Use: run the prefill, call `start_steps`, then for every step `prepare_step`, a forward of the base model, `keep`.

    Args:
        n_layers: layers of the base model.
        capacity: slots per row: prompt, tokens to generate and the nodes of one tree.
    """

    def __init__(self, n_layers: int, capacity: int):
        self.slots = Slots(capacity)
        super().__init__(layers=[SpeculativeLayer(self.slots) for _ in range(n_layers)])

    def start_steps(self, attention_mask: torch.Tensor, max_nodes: int, dense: bool = False) -> None:
        """Ends the prefill.

        Args:
            attention_mask: (batch, prompt), 0 at padding.
            max_nodes: the most nodes of a step.
            dense: whether every slot in use is attended to by every node: one node per step and no padding.
        """
        batch, length = attention_mask.shape
        device = attention_mask.device
        self.slots.rows = torch.arange(batch, device=device)[:, None]
        # The position that each slot's key stands for, -1 where the slot is empty or was rejected.
        self.positions = torch.full((batch, self.slots.capacity), -1, device=device)
        self.positions[:, :length] = torch.where(attention_mask.bool(), attention_mask.long().cumsum(-1) - 1, -1)
        # The next `max_nodes` free slots of each row, and the first slot that no row has ever used.
        self.free = length + torch.arange(max_nodes, device=device).repeat(batch, 1)
        self.frontier = torch.full((batch, 1), length + max_nodes, device=device)
        self.dense = dense
        self.padded = not bool(attention_mask.all())
        self.along = torch.arange(max_nodes, device=device)
        dtype = self.layers[0].keys.dtype
        self.attend = torch.zeros((), dtype=dtype, device=device)
        self.ignore = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)

    def prepare_step(self, ancestors: torch.Tensor, in_use: int) -> torch.Tensor | None:
        """Gives this step's nodes their slots and returns what each of them attends to.

        Args:
            ancestors: (batch, nodes, nodes) bool.
            in_use: the highest `frontier` of all rows.

        Returns:
            (batch, 1, nodes, in_use), 0 where a node attends to a slot, else the lowest number of the keys' dtype.
            To be added to the scores, for eager attention takes no other mask, and sdpa turns others into this one.
            None where the cache is dense.
        """
        nodes = ancestors.shape[1]
        self.slots.nodes, self.slots.in_use = self.free[:, :nodes], in_use
        if self.dense:
            return None
        mask = self._additive(self.positions[:, :in_use] >= 0)[:, None].repeat(1, nodes, 1)
        mask.scatter_(2, self.slots.nodes[:, None].expand(-1, nodes, -1), self._additive(ancestors))
        return mask[:, None]

    def _additive(self, attends: torch.Tensor) -> torch.Tensor:
        return torch.where(attends, self.attend, self.ignore)

    def keep(self, nodes: torch.Tensor, n_kept: torch.Tensor, position: torch.Tensor) -> None:
        """Keeps the first `n_kept` (batch,) of `nodes` (batch, depth + 1), a path, and frees all other nodes.

        Args:
            position: (batch, 1), of the path's first node.
        """
        slots = self.slots.nodes.gather(1, nodes)
        along = self.along[: nodes.shape[1]]
        kept = along < n_kept[:, None]
        self.positions.scatter_(1, slots, torch.where(kept, position + along, -1))
        self.free.scatter_(1, nodes, torch.where(kept, self.frontier + along, slots))
        self.frontier = self.frontier + n_kept[:, None]

    def to_dynamic_cache(self) -> DynamicCache | None:
        """A plain cache of the same keys and values in the order of their positions.

        None if rows differ in length or the prompt was padded: a plain cache has no room for either.
        """
        lengths = (self.positions >= 0).sum(-1)
        if self.padded or (lengths != lengths[0]).any():
            return None
        slots = self.positions.argsort(-1)[:, self.slots.capacity - int(lengths[0]) :]  # empty slots sort first
        dynamic = DynamicCache()
        for index, layer in enumerate(self.layers):
            keys, values = layer.keys[self.slots.rows, :, slots], layer.values[self.slots.rows, :, slots]
            dynamic.update(keys.transpose(1, 2), values.transpose(1, 2), index)
        return dynamic
