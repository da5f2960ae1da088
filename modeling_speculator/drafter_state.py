"""What a drafter knows in one call of the tokens that are verified: in tensors that belong to the call.

A drafter that wants more than the last context vector has a `start` that returns a `DrafterState` of its own.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import Cache

from .cache import SpeculativeCache
from .candidate_tree import CandidateTree
from .verification import Verified


@dataclass(frozen=True)
class Call:
    """What a drafter is told when a call starts.

    A column is a place in the base model's cache, padding and what is in the cache only included.

    Attributes:
        context_vector: (batch, 1, emb_dim), of the prompt's last token.
        capacity: columns that a row may come to, those of a path past its end included.
        offsets: (batch, 1), from a column to its position.
        past: the cache that the caller has passed; or None.
    """

    context_vector: torch.Tensor
    capacity: int
    offsets: torch.Tensor
    past: Cache | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the first token after it.

    Attributes:
        tokens: (batch, columns), the token after each column; -1 where it is in the caller's cache only.
        mask: (batch, columns) bool, False at padding.
        known: the same, and False where the token after a column is no text.
        first_column: of those that were read in this call; those before were in the caller's cache.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    known: torch.Tensor
    first_column: int


class DrafterState:
    """Of a drafter that asks for nothing: prompt lookup, or one that is turned off.

    Attributes:
        STATE: names of the tensors that steps write to or read again and again.
        context_vector: (batch, 1, emb_dim), what a draft starts from.
        is_ready: whether that is known: before the first step not to all.
    """

    STATE: tuple[str, ...] = ()
    context_vector: torch.Tensor | None = None
    is_ready = True

    def beside_nodes(self, tree: CandidateTree, masks, cache: SpeculativeCache) -> AbstractContextManager:
        """Surrounds a step's forward: for a drafter that adds to it.

        Args:
            masks: of the nodes, as the base model is given them (`SpeculativeCache.prepare_step`).
        """
        return nullcontext()

    def verified(self, tree: CandidateTree, logits: torch.Tensor) -> tuple[CandidateTree, torch.Tensor]:
        """After it: the tree that was verified, and the logits of its nodes. A drafter may have left nodes out."""
        return tree, logits

    def within(self, columns: int) -> None:
        """No row of the cache has more columns when the next tree is drafted."""

    def prefill(self, prompt: Prompt, cache: SpeculativeCache) -> None:
        """Takes note of a prompt; called where the drafter reads text.

        Args:
            cache: has the prompt's context vectors and features.
        """

    def extend(self, verified: Verified, cache: SpeculativeCache, root_column: torch.Tensor) -> None:
        """Takes note of the tokens that a step has emitted, some in each row. A row that has ended has none, and what
        is drafted for it any more does not count.

        Args:
            cache: has the context vectors and features of the step's nodes.
            root_column: (batch, 1), of the node that the first of them was drawn from.
        """

    def remember(self, cache, tokens: torch.Tensor, lengths: torch.Tensor, in_cache_only: int) -> None:
        """Keeps, beside a cache that is handed back to the caller, what a later call with it need not compute.

        Args:
            tokens: (batch, columns), the text; all but the last are in the cache.
            lengths: (batch, 1), of each row's text.
            in_cache_only: columns of the cache before the text.
        """


class LastContextVector(DrafterState):
    """Of a drafter that starts from the vector that the last token was drawn from, and knows no other."""

    STATE = ("context_vector",)

    def __init__(self, call: Call):
        self.context_vector = call.context_vector.clone(memory_format=torch.contiguous_format)

    def extend(self, verified: Verified, cache: SpeculativeCache, root_column: torch.Tensor) -> None:
        nodes = verified.nodes
        if nodes.shape[1] > 1:
            nodes = nodes.gather(1, verified.last)
        self.context_vector.copy_(at_nodes(cache.context_vectors, nodes))


def at_nodes(vectors: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    """(batch, nodes, size) at (batch, n) -> (batch, n, size)."""
    return vectors.gather(1, nodes.to(vectors.device)[:, :, None].expand(-1, -1, vectors.shape[-1]))


__all__ = ["Call", "DrafterState", "LastContextVector", "Prompt"]
