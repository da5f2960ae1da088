"""A drafter's own attention layer over verified tokens: context vectors that have seen more than one place."""

import torch
from torch import nn
from torch.nn import functional as F

from .cells import starting_as


class OwnAttention:
    """What configs share whose drafters have an attention layer: `context_heads`, `emb_dim`, `rope_theta`, and for
    some `feature_layers`."""

    context_head_dim = 0  # width of a head, where it isn't the layer's over the heads

    @property
    def n_context_heads(self) -> int:
        return self.context_heads or max(1, self.context_width // 64)

    @property
    def context_width(self) -> int:
        """Of the layer."""
        return self.emb_dim

    def check_attention(self, *sizes: str) -> None:
        """Raises a ValueError where its sizes make no sense; those of some names must be integers of at least 0."""
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"`{name}` must be an integer of at least 0, but is {value!r}.")
        if self.context_head_dim % 2:
            raise ValueError(f"`context_head_dim` must be even, but is {self.context_head_dim}.")
        if not self.context_head_dim and self.context_width % (2 * self.n_context_heads):
            raise ValueError(
                f"`emb_dim={self.context_width}` can't be split into {self.n_context_heads} heads of an even width: "
                "set `context_heads`."
            )
        if not isinstance(self.rope_theta, int | float) or self.rope_theta <= 1:
            raise ValueError(f"`rope_theta` must be a number above 1, but is {self.rope_theta!r}.")

    def check_feature_layers(self, may_repeat: bool = False) -> None:
        """Raises a ValueError for `feature_layers` that name none, or one twice; None becomes an empty list."""
        layers = self.feature_layers = [] if self.feature_layers is None else self.feature_layers
        wrong = not isinstance(layers, list | tuple) or any(type(at) is not int or at < 0 for at in layers)
        if wrong or (len(set(layers)) < len(layers) and not may_repeat):
            different = "" if may_repeat else "different "
            raise ValueError(f"`feature_layers` must be a list of {different}integers from 0 on, but is {layers!r}.")


class ContextLayer(nn.Module):
    """`c_t = h_t + Wout layer(W [norm(E[token_{t+1}]); norm(f_t)])`: one causal pre-norm decoder layer over pairs.

    Pair t is the context vector h_t and the token that was drawn from it. f_t is h_t, or `Wf norm(features_t)` of
    hidden states of inner layers. What is written last in each branch starts at zero, and so `c_t = h_t`.

    Args:
        width: of context vectors, and of the layer.
        heads: of the attention; each has keys of its own.
        inner_dim: of its SwiGLU.
        n_features: hidden states of inner layers of each token; 0 for none.
        rope_theta: of the rotary positions.
    """

    def __init__(self, width: int, heads: int, inner_dim: int, n_features: int, rope_theta: float):
        super().__init__()
        self.heads, self.rope_theta = heads, rope_theta
        self.fuse_norm = _norm(n_features * width) if n_features else None
        self.fuse = _linear(n_features * width, width) if n_features else None
        self.token_norm, self.feature_norm = _norm(width), _norm(width)
        self.proj_in = _linear(2 * width, width)
        self.attention_norm, self.qkv, self.attention_out = (
            _norm(width),
            _linear(width, 3 * width),
            _linear(width, width, "zero"),
        )
        self.mlp_norm, self.gate_up, self.down = (
            _norm(width),
            _linear(width, 2 * inner_dim),
            _linear(inner_dim, width, "zero"),
        )
        self.proj_out = _linear(width, width, "zero")

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_in.weight.dtype

    @property
    def width(self) -> int:
        """Of what it makes of a context vector."""
        return self.proj_out.out_features

    @property
    def key_shape(self) -> tuple[int, int]:
        """Heads of keys, and their width."""
        return self.heads, self.proj_in.out_features // self.heads

    def read(
        self, hidden_states: torch.Tensor, tokens: torch.Tensor, features: torch.Tensor | None, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What pairs bring to the attention.

        Args:
            hidden_states, tokens: (batch, n, width), context vectors, and the embeddings of what was drawn from them.
            features: (batch, n, n_features * width); None where there are none.
            positions: (batch, n) or (1, n), of the context vectors.

        Raises:
            ValueError: where features are missing, or given to a layer that reads none.

        Returns:
            The residual stream (batch, n, width), and queries, keys, values (batch, heads, n, head_dim).
        """
        if (features is None) != (self.fuse is None):
            wanted = "needs" if features is None else "has no use for"
            raise ValueError(f"This context layer {wanted} `features`, hidden states of inner layers.")
        dtype = self.proj_in.weight.dtype
        read = hidden_states.to(dtype) if self.fuse is None else self.fuse(self.fuse_norm(features.to(dtype)))
        stream = self.proj_in(torch.cat([self.token_norm(tokens.to(dtype)), self.feature_norm(read)], dim=-1))
        batch, n, width = stream.shape
        qkv = self.qkv(self.attention_norm(stream)).view(batch, n, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        speeds = rope_speeds(query.shape[-1], self.rope_theta, query.device)
        return stream, *rotated(query, key, positions, speeds), value

    def attend(
        self,
        hidden_states: torch.Tensor,
        stream: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The new context vectors (batch, n, width), of pairs that attend to keys and values of any number.

        Args:
            mask: (batch or 1, 1, n, keys) bool; None for every pair to all before it.
        """
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        stream = stream + self.attention_out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(stream)).chunk(2, dim=-1)
        stream = stream + self.down(F.silu(gate) * up)
        return hidden_states.to(self.proj_out.weight.dtype) + self.proj_out(stream)


def rope_speeds(head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """(head_dim / 2,), angles of a position in radians."""
    half = head_dim // 2
    return theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)


def rotated(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, speeds: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary positions (arXiv 2104.09864) in halves, as Llama has them: (batch, heads, n, head_dim) each.

    Args:
        speeds: (head_dim / 2,), angles of a position.
        scale: of both (YaRN's, arXiv 2309.00071).
    """
    angles = positions[:, None, :, None].float() * speeds
    cos, sin = (scale * angles.cos()).to(query.dtype), (scale * angles.sin()).to(query.dtype)

    def turn(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    return turn(query), turn(key)


def _linear(width_in: int, width_out: int, start: str = "noise") -> nn.Linear:
    return starting_as(start, nn.Linear(width_in, width_out, bias=False))


def _norm(width: int) -> nn.RMSNorm:
    return nn.RMSNorm(width, eps=1e-5)
