"""What streams know in one call: what came out of those of the last verified token."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .cache import SpeculativeCache
from .candidate_tree import CandidateTree
from .drafter_state import Call, DrafterState, at_nodes
from .families import final_norm, mask_kinds
from .guests import received
from .streams import Masks, Streams
from .streams_of_nodes import Pruning, StreamsOfNodes
from .verification import Verified


class StreamState(DrafterState):
    """Streams run beside the nodes of each step, and those of the last node that was emitted draft the next tree.

    None have run before the first step, which therefore verifies the root alone.
    """

    STATE = ("context_vector",)
    is_ready = False

    def __init__(self, streams: Streams, base_model, call: Call, pruning: Pruning | None = None):
        self.streams, self.norm, self.pruning = streams, final_norm(base_model), pruning
        self.kinds = mask_kinds(base_model.config.get_text_config(decoder=True))
        batch, _, width = call.context_vector.shape
        self.context_vector = call.context_vector.new_zeros(batch, 1, len(streams) * width)
        self.guest = None

    @contextmanager
    def beside_nodes(self, tree: CandidateTree, masks: Masks, cache: SpeculativeCache) -> Iterator[None]:
        guest_slots = cache.layers[self.streams.first_layer].guest_slots
        self.guest = StreamsOfNodes(self.streams, self.kinds, masks, tree, cache, guest_slots, self.pruning)
        with received(self.guest):
            yield

    def verified(self, tree: CandidateTree, logits: torch.Tensor) -> tuple[CandidateTree, torch.Tensor]:
        kept = self.guest.kept
        return (tree, logits) if kept is None else (tree.only(kept), at_nodes(logits, kept))

    def extend(self, verified: Verified, cache: SpeculativeCache, root_column: torch.Tensor) -> None:
        leaving, self.guest = self.guest.leaving, None
        last = verified.nodes.gather(1, verified.last).to(leaving.device)  # (batch, 1)
        width = len(self.streams) * leaving.shape[2]
        of_nodes = leaving.reshape(len(leaving), -1, width)
        of_last = of_nodes.gather(1, last[:, :, None].expand(-1, -1, width))
        normed = self.norm(of_last.view(len(leaving), len(self.streams), -1))
        self.context_vector.copy_(normed.view(len(leaving), 1, width))
        self.is_ready = True


__all__ = ["StreamState"]
