"""Streams beside the nodes of a step; and which nodes the upper layers see, where a tree is pruned before them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .cache import SpeculativeCache
from .candidate_tree import CandidateTree
from .drafter_state import at_nodes
from .families import final_norm, output_logits
from .guests import Guest
from .streams import Masks, Streams, changed


class EarlyExit(nn.Module):
    """`h + B A h`: what the base model's final norm and LM head read of a lower layer's state; B starts at zero."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.A, self.B = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., width) -> the same."""
        weight = self.A.weight
        return states + self.B(self.A(states.to(weight.device, weight.dtype))).to(states.device, states.dtype)


@dataclass(frozen=True)
class Pruning:
    """Keeps the nodes to which the base model's lower layers give the most probable paths (arXiv 2402.11131, 3.2).

    Attributes:
        n_kept: nodes of each row, the root included.
        exit: what guesses, from the states in a lower layer.
    """

    exit: EarlyExit
    n_kept: int
    base_model: nn.Module

    def kept(self, states: torch.Tensor, tree: CandidateTree) -> torch.Tensor:
        """Nodes (batch, n_kept) in ascending order, with all their ancestors.

        Args:
            states: (batch, nodes, hidden_size).
        """
        logits = output_logits(self.base_model, final_norm(self.base_model)(self.exit(states)))
        log_probs = logits.float().log_softmax(-1).to(tree.parents.device)
        of_child = at_nodes(log_probs, tree.parents).gather(2, tree.input_ids[:, :, None])[:, :, 0]
        of_child = of_child.nan_to_num(nan=_LEAST, neginf=_LEAST).clamp(_LEAST, 0.0)
        of_child = of_child.masked_fill(tree.depths == 0, 0.0)  # the root is there
        of_path = torch.where(tree.ancestors, of_child[:, None], 0.0).sum(-1)
        # No more than any node before it has, however sums are rounded; and padding comes last.
        of_path = torch.where(tree.ancestors, of_path[:, None], 0.0).amin(-1)
        along = torch.arange(of_path.shape[1], device=of_path.device)
        of_path = of_path.masked_fill((tree.depths == 0) & (along > 0), -torch.inf)
        # Stable: of equals the one that comes first is taken, and a parent comes before its children.
        best = of_path.sort(dim=1, descending=True, stable=True).indices
        return best[:, : self.n_kept].sort(dim=1).values


_LEAST = -1e30


@dataclass
class StreamsOfNodes(Guest):
    """A step's forward over nodes, each with its streams after them all.

    Attributes:
        kinds: of all layers, which of the masks they take.
        masks: of the nodes, additive: (batch, 1, nodes, slots).
        tree: of the nodes.
        cache: that the forward uses.
        guest_slots: of the cache, before those of the masks.
        kept: (batch, n), the nodes that the upper layers see, if not all.
        leaving: (batch, n * streams, hidden_size), what came out of the last layer.
    """

    streams: Streams
    kinds: Sequence[str | None]
    masks: Masks
    tree: CandidateTree
    cache: SpeculativeCache
    guest_slots: int
    pruning: Pruning | None = None
    kept: torch.Tensor | None = None
    leaving: torch.Tensor | None = None
    n_nodes: int = 0
    repeated: dict = field(default_factory=dict)

    def __post_init__(self):
        self.n_nodes = self.tree.input_ids.shape[1]

    def enter(self, layer: int, inputs: dict) -> None:
        if layer < self.streams.first_layer:
            return
        states, kind = inputs["hidden_states"], self.kinds[layer]
        if layer == self.streams.first_layer:
            if self.pruning is not None and self.n_nodes > self.pruning.n_kept:
                self._prune(states)
            states = self._of_kept(states)
            states = inputs["hidden_states"] = torch.cat([states, self.streams.starting_at(states)], dim=1)
        if ("mask", kind) not in self.repeated:
            mask = self.masks[kind] if isinstance(self.masks, dict) else self.masks
            self.repeated["mask", kind] = self._with_streams(mask)
        inputs["attention_mask"] = self.repeated["mask", kind].to(states.device)
        for name in ("position_ids", "position_embeddings"):
            if inputs.get(name) is not None:
                if (name, kind) not in self.repeated:
                    self.repeated[name, kind] = changed(inputs[name], self._repeat)
                inputs[name] = self.repeated[name, kind]

    def _prune(self, states: torch.Tensor) -> None:
        self.kept = self.pruning.kept(states, self.tree)
        self.n_nodes = self.pruning.n_kept
        self.cache.leave_out_but(self.kept)

    def _of_kept(self, values: torch.Tensor) -> torch.Tensor:
        """(batch or 1, nodes, ...) -> (batch, n, ...)."""
        if self.kept is None:
            return values
        kept = self.kept.to(values.device)
        return values.expand(len(kept), *values.shape[1:])[torch.arange(len(kept), device=kept.device)[:, None], kept]

    def _with_streams(self, mask: torch.Tensor) -> torch.Tensor:
        """(batch, 1, nodes, slots) -> (batch, 1, n * (1 + streams), guest_slots + slots)."""
        mask = self._of_kept(mask.transpose(1, 2)).transpose(1, 2)
        lowest = torch.finfo(mask.dtype).min
        own = self.streams.own_mask(self.n_nodes, self.guest_slots, mask.device)
        own = torch.zeros_like(own, dtype=mask.dtype).masked_fill(~own, lowest)
        left = torch.cat([own.new_full((self.n_nodes, self.guest_slots), lowest), own])
        right = torch.cat([mask, mask.repeat_interleave(len(self.streams), dim=2)], dim=2)
        return torch.cat([left.expand(len(mask), 1, -1, -1), right], dim=3)

    def _repeat(self, values: torch.Tensor) -> torch.Tensor:
        values = self._of_kept(values)
        return torch.cat([values, values.repeat_interleave(len(self.streams), dim=1)], dim=1)

    def adapt(self, layer: int, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        if not self.streams.adapts(layer, name):
            return outputs
        rows = self.n_nodes * (1 + len(self.streams))
        return self.streams.adapt(layer, name, inputs, outputs, len(self.tree.input_ids), rows, first=self.n_nodes)

    def leave(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As many rows as have entered the model, which some reshape by: those of pruned nodes are zero."""
        self.leaving = hidden_states[:, self.n_nodes :]
        nodes = hidden_states[:, : self.n_nodes]
        if self.kept is None:
            return nodes
        every = nodes.new_zeros(len(nodes), self.tree.input_ids.shape[1], nodes.shape[2])
        return every.scatter(1, self.kept.to(nodes.device)[:, :, None].expand_as(nodes), nodes)


__all__ = ["EarlyExit", "Pruning", "StreamsOfNodes"]
