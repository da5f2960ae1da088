"""The text of a batch while it is decoded, row by row: what it is, how long, and what it may still emit."""

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .families import family_of
from .lookup import readable_tokens
from .request import Request
from .verification import Verified


class Rows:
    """All state of a step that is not the cache's, in tensors on the device that stay where they are.

    Each row has a length of its own. A column is a place in its text, padding included.

    Attributes:
        sequences: (batch, columns), the text, with room for what a step writes past a row's end: that is overwritten
            by the next step, or cut off in the end.
        readable: (batch, columns) bool, False at padding and at places for images.
        lengths: (batch, 1), columns of text.
        budget: (batch,), tokens that a row may still emit; 0 for one that has ended.
        root: (batch, 1), the last token.
        in_cache_only: columns that the cache has before the text begins.
        token_types: (batch, 1), of every token that comes; None where the base model adds none.

    Args:
        config: of the base model.
        capacity: columns that the text may come to, the nodes of a tree included.
        depth: the most tokens of a path of a draft.
        device: that the state lies on.
        drafts: whether anything is ever drafted.
    """

    # What steps write to or read again and again: in a CUDA graph these tensors must stay where they are.
    STATE = ("sequences", "readable", "lengths", "budget", "root", "along")
    STATE += ("from_length", "last_position", "to_root_column")

    def __init__(
        self,
        request: Request,
        config: PreTrainedConfig,
        capacity: int,
        depth: int,
        device: torch.device,
        drafts: bool,
    ):
        input_ids = request.input_ids.to(device).long()
        batch, length = input_ids.shape
        self.drafts, self.pad_token_id = drafts, request.pad_token_id
        self.in_cache_only = request.context_length - length
        self.sequences = input_ids.new_zeros(batch, capacity + depth + 1)
        self.sequences[:, :length] = input_ids
        self.readable = torch.ones_like(self.sequences, dtype=torch.bool)
        mask = request.prompt_mask[:, self.in_cache_only :].to(device)
        self.readable[:, :length] = readable_tokens(input_ids, mask, config)
        self.lengths = torch.full((batch, 1), length, device=device)
        self.budget = torch.full((batch,), request.budget, device=device)
        self.root = self.sequences.new_zeros(batch, 1)
        text = config.get_text_config(decoder=True)
        adds_types = request.last_token_types is not None and family_of(text).embeds_token_types
        self.token_types = request.last_token_types.to(device) if adds_types else None
        self.along = torch.arange(depth + 1, device=device)
        self.from_length = request.last_positions.to(device) - length  # of a text to its last token's position
        self.last_position = self.from_length + length + request.budget - 1  # the last token is never run
        self.to_root_column = torch.full((1, 1), self.in_cache_only - 1, device=device)  # from a text's length

    @property
    def root_column(self) -> torch.Tensor:
        """(batch, 1), of each root in the cache."""
        return self.lengths + self.to_root_column

    @property
    def offsets(self) -> torch.Tensor:
        """(batch, 1), from a column of the cache to its position."""
        return self.from_length + 1 - self.in_cache_only

    def tokens_after(self, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The token after each of the prompt's columns, once the first one has been emitted.

        Returns:
            Token ids (batch, columns), -1 where they are in the cache only, and whether they are text, bool.
        """
        hidden = max(0, self.in_cache_only - 1)
        text = slice(hidden + 1 - self.in_cache_only, columns + 1 - self.in_cache_only)
        tokens = F.pad(self.sequences[:, text], (hidden, 0), value=-1)
        return tokens, F.pad(self.readable[:, text], (hidden, 0), value=False)

    def positions(self, depths: torch.Tensor) -> torch.Tensor:
        """(batch, nodes), of nodes so deep below the root.

        Nodes past the last token that can be emitted are never accepted; their positions may not exist.
        """
        return torch.minimum(self.lengths + self.from_length + depths, self.last_position)

    def types_of(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a forward over new tokens (batch, n) needs where the prompt has token types: all have its last one."""
        return {} if self.token_types is None else {"token_type_ids": self.token_types.expand_as(input_ids)}

    def write(self, tokens: torch.Tensor) -> None:
        """Puts tokens (batch, n) behind each text."""
        self.sequences.scatter_(1, self.lengths + self.along[: tokens.shape[1]], tokens)

    def advance(self, verified: Verified, budget: torch.Tensor) -> torch.Tensor:
        """Lengthens each text by what was emitted, and moves its root to the last of it.

        The tokens are written already.

        Args:
            budget: (batch,), what is left.

        Returns:
            (batch,), how many nodes of the accepted path are now part of each text.
        """
        tokens, _, n_tokens = verified
        if not self.drafts:
            # As in `generate`: a row that has ended goes on with padding, until all have.
            n_tokens = n_tokens.amax().expand_as(n_tokens)
        elif tokens.shape[1] > 1:
            tokens = tokens.gather(1, verified.last)
        self.lengths.add_(n_tokens[:, None])
        self.budget.copy_(budget)
        self.root.copy_(tokens)
        return n_tokens

    def text(self, longest: int) -> torch.Tensor:
        """(batch, longest), padded where rows have ended before."""
        sequences = self.sequences[:, :longest]
        past_end = torch.arange(longest, device=sequences.device) >= self.lengths
        return sequences.masked_fill(past_end, self.pad_token_id)
