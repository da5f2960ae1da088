"""How the base model draws a token: processors of its scores, then the most probable one or a sampled one."""

import torch
from transformers.generation import logits_process as lp


# These look at scores only, each row for itself, and so can be applied to all nodes of a tree at once. Any other
# processor, a subclass included, may read the text so far: it is walked along the accepted path (`walk.py`).
SCORES_ONLY = (
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
    lp.InfNanRemoveLogitsProcessor,
    lp.LogitNormalization,
    lp.MinPLogitsWarper,
    lp.SuppressTokensLogitsProcessor,
    lp.TemperatureLogitsWarper,
    lp.TopHLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.TypicalLogitsWarper,
)


_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, SplitMix64's step from one number to the next


class TokenDraw:
    """Draws one token from each row of scores.

    The noise of a sampled token belongs to (row of the batch, position in its text), not to a node or a step: a seed
    gives the same text whatever was drafted. It is added to the scores (Gumbel-max), so that nearly equal scores draw
    the same token, and text hardly depends on the last bits of a product.

    Args:
        processors: what is applied to the scores, in order; all of them `SCORES_ONLY`.
        row_keys: (batch,) random integers for sampling, from `draw_row_keys`; None for greedy decoding.
        vocab_size: tokens that are scored.
        max_depth: the most drafted tokens on a path.
    """

    def __init__(self, processors: list, row_keys: torch.Tensor | None, vocab_size: int, max_depth: int = 0):
        self.processors, self.row_keys = processors, row_keys
        if row_keys is not None:
            self.token_keys = token_keys(vocab_size, row_keys.device)
            self.along = torch.arange(max_depth + 1, device=row_keys.device)

    def at_nodes(
        self, logits: torch.Tensor, depths: torch.Tensor, max_depth: int, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The token drawn after each node, all nodes at once.

        Args:
            logits: (batch, nodes, vocab).
            depths: (batch, nodes), at most `max_depth`.
            lengths: (batch, 1), columns of text up to the root.

        Returns:
            Tokens (batch, nodes), and whether the scores allow a draw (batch, nodes), None if they need not.
        """
        # In float32, as `generate` does: equal logits are told apart the same way.
        scores = logits.float()
        if self.processors:
            scores = scores.flatten(0, 1)
            for processor in self.processors:
                scores = processor(None, scores)
            scores = scores.view(logits.shape)
        if self.row_keys is None:
            return scores.argmax(-1), None
        positions = lengths + self.along[: max_depth + 1]
        noise = gumbel_noise(self.row_keys[:, None], positions, self.token_keys)  # (batch, max_depth + 1, vocab)
        if max_depth > 0:
            noise = noise.gather(1, depths[:, :, None].expand_as(scores))
        return (scores + noise).argmax(-1), scores.amax(-1).isfinite()

    def of_rows(self, scores: torch.Tensor, rows: slice, length: int) -> torch.Tensor:
        """The token drawn from processed scores (rows, vocab) by some rows of the same length: (rows,).

        Raises:
            ValueError: if there is no token to draw.
        """
        if self.row_keys is None:
            return scores.argmax(-1)
        check_drawable(bool(scores.amax(-1).isfinite().all()))
        positions = torch.full((1, 1), length, device=scores.device)
        return (scores + gumbel_noise(self.row_keys[rows, None], positions, self.token_keys)[:, 0]).argmax(-1)


def check_drawable(drawable: bool) -> None:
    """Raises a ValueError where a row of scores had no finite highest one."""
    if not drawable:
        raise ValueError(
            "Can't sample: the base model's scores are NaN or infinite, or every token is forbidden. Check the logits "
            "processors and the model's dtype, or pass `remove_invalid_values=True`."
        )


def draw_row_keys(batch: int, device: torch.device) -> torch.Tensor:
    """One random integer per row from torch's generator: the seed of a call's noise."""
    return torch.randint(2**63 - 1, (batch,), device=device)


def text_keys(input_ids: torch.Tensor, seed: int | torch.Tensor) -> torch.Tensor:
    """One integer per text (batch, length) -> (batch,), a function of its tokens and a seed, of all or of each.

    For noise that is the same whichever process, batch or attempt a text is continued in.
    """
    positions = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    return _mix(_mix(_mix(positions + input_ids * _GOLDEN).sum(-1)) + seed)


def token_keys(vocab_size: int, device: torch.device) -> torch.Tensor:
    """What each token adds to a place's key in SplitMix64's counter: (vocab,) int64, made once for many draws.

    Not inside of a compiled step: inductor computes with an `arange` in 32 bits, where such a product has no room.
    """
    return torch.arange(1, vocab_size + 1, device=device) * _GOLDEN


def gumbel_noise(row_keys: torch.Tensor, positions: torch.Tensor, token_keys: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise that is a function of (row key, position, token): (..., positions, vocab) float32.

    Counter-based, so that nothing is kept and any position can be asked for in any order, on any device. Bits are
    SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), which passes BigCrush.

    Args:
        row_keys: (batch, 1) int64.
        positions: (batch, positions) int64; read from memory where this is compiled, as `token_keys` says.
        token_keys: (vocab,), from the function of this name; or (batch, 1, n), those of some tokens.
    """
    stream = _mix(row_keys + positions * -0x2E0F93B0B2C6A3A7)[..., None]  # an odd constant
    bits = _mix(stream + token_keys)
    # Of 63 bits, so that small numbers, which win, are exact to float32's relative precision; 0 and 1 are left out.
    uniform = ((bits & 0x7FFFFFFFFFFFFFFF).float() * 2.0**-63).clamp(2.0**-63, 1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer. int64 products wrap; >> copies the sign, which the masks remove."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
