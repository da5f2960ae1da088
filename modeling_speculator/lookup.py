"""What followed when the text last went as it ends now: a branch of the tree that costs no model (prompt lookup).

The idea: A. Saxena, Prompt Lookup Decoding (2023). Here for rows of a batch, on their device, in fixed shapes.
"""

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig


# Tokens of the end of the text that are looked for: as many as possible of these.
_LONGEST, _SHORTEST = 4, 2
_OF_TEXT = ("bos_", "eos_", "pad_", "sep_", "cls_", "unk_", "decoder_start_")


def check_n_lookup_tokens(n_lookup_tokens: int, least: int = 0) -> None:
    """Raises a ValueError for what is no number of tokens."""
    if not isinstance(n_lookup_tokens, int) or isinstance(n_lookup_tokens, bool) or n_lookup_tokens < least:
        raise ValueError(f"`n_lookup_tokens` must be an integer of at least {least}, but is {n_lookup_tokens!r}.")


def lookup_tokens(config) -> int:
    """The tokens of a drafter's lookup branch; 0 where it has none, or drafts nothing."""
    return (getattr(config, "n_lookup_tokens", None) or 0) if config.n_candidates > 0 else 0


def longest_draft(config) -> int:
    """The most tokens of a draft, by a drafter's heads or by its lookup branch."""
    return max(config.n_predict, lookup_tokens(config))


def continuation(
    text: torch.Tensor, readable: torch.Tensor, lengths: torch.Tensor, n_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens after the latest of the longest earlier occurrences of each text's last 4, 3 or 2 tokens.

    Where fewer than `n_tokens` follow, the text repeats itself, and so does what is returned.

    Args:
        text: (batch, columns); what is past a row's length does not count.
        readable: (batch, columns) bool, False at padding and at what is no text.
        lengths: (batch, 1), columns of each text.

    Returns:
        Token ids (batch, n_tokens), and whether there are any (batch,): bool.
    """
    columns = torch.arange(text.shape[1], device=text.device)
    matching = torch.zeros_like(text)  # at each column, how many of the last tokens end there
    goes_on = columns < lengths - 1  # before the last token itself
    for back in range(_LONGEST):
        at = lengths - 1 - back
        of_text = (at >= 0) & readable.gather(1, at.clamp(min=0))
        same = (text == text.gather(1, at.clamp(min=0))) & readable & of_text
        goes_on = goes_on & F.pad(same, (back, 0))[:, : len(columns)]
        matching += goes_on
    best, place = (matching * len(columns) + columns).max(-1, keepdim=True)  # of equals the last
    follows = place + 1 + torch.arange(n_tokens, device=text.device) % (lengths - 1 - place).clamp(min=1)
    found = best >= _SHORTEST * len(columns)
    return text.gather(1, follows.clamp(max=len(columns) - 1)), found[:, 0]


def readable_tokens(input_ids: torch.Tensor, mask: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """(batch, length) bool: what of a prompt is text, and not padding or a place for an image.

    Args:
        mask: (batch, length), 0 at padding.
        config: of the base model, in which places for images and the like have ids.
    """
    places = [
        value
        for name, value in vars(config).items()
        if name.endswith(("_token_id", "_token_index")) and not name.startswith(_OF_TEXT) and isinstance(value, int)
    ]
    return mask.bool() & ~torch.isin(input_ids, torch.tensor(places, device=input_ids.device, dtype=input_ids.dtype))
