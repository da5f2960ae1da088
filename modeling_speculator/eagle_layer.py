"""EAGLE's layer: a decoder layer over pairs of a feature and the token after it, whose output is the next feature."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .cells import starting_as
from .context_layer import rope_speeds, rotated


# Where published checkpoints have a norm that the papers' layer has not, or has elsewhere.
EXTRA_NORMS = {
    "fc": "over all that `fc` reads, at once",
    "features": "over each layer's part of what `fc` reads",
    "residual": "over what the attention is added to: that of what it reads",
    "feedback": "over what is fed back: that of what the LM head reads",
}


@dataclass(frozen=True)
class EagleShape:
    """Sizes of an EAGLE layer.

    Attributes:
        width: of what it guesses.
        heads, kv_heads, head_dim: of its attention.
        inner_dim: of its SwiGLU.
        features: numbers that `fc` reads of a token, hidden states of inner layers; 0 where it is context vectors.
        n_features: layers that those are of.
        eps: of its norms.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner_dim: int
    features: int = 0
    n_features: int = 0
    eps: float = 1e-6


class EagleLayer(nn.Module):
    """Pair t is a feature f_t and the embedding of token t + 1; the layer guesses f_{t+1}.

    EAGLE (arXiv 2401.15077, section 4.1), where `n_features` is 0: f_t is the context vector; `fc [embedding; f_t]` is
    what enters the layer, without a norm before its attention.
    EAGLE-3 (arXiv 2503.01840, section 3.1): f_t is `fc` of what enters some layers of the base model, one after the
    other; queries, keys and values read `[norm(embedding); norm(f_t)]`, and what is added to is f_t.

    The names of the modules are those of EAGLE-3's published checkpoints.

    Args:
        rope_theta: of the rotary positions; None where `keep_rope_speeds` says which they are.
        rope_scale: what their cosines and sines are multiplied by.
        biased: "fc" and "qkv", those projections that have a bias.
        norms: of `EXTRA_NORMS`.
    """

    def __init__(
        self,
        shape: EagleShape,
        rope_theta: float | None,
        rope_scale: float = 1.0,
        biased: Collection[str] = (),
        norms: Collection[str] = (),
    ):
        super().__init__()
        self.width, self.heads, self.key_shape = shape.width, shape.heads, (shape.kv_heads, shape.head_dim)
        self.rope_theta, self.rope_scale, self.norms = rope_theta, rope_scale, frozenset(norms)
        if rope_theta is None:
            self.register_buffer("rope_bits", torch.zeros(shape.head_dim // 2, dtype=torch.int32))
        width, self.is_fused = shape.width, shape.features > 0
        self.add_inputs(shape, "fc" in biased)
        read = 2 * width if self.is_fused else width
        self.q_proj = _linear(read, shape.heads * shape.head_dim, "qkv" in biased)
        self.k_proj, self.v_proj = (_linear(read, shape.kv_heads * shape.head_dim, "qkv" in biased) for _ in range(2))
        self.o_proj = starting_as("zero", _linear(shape.heads * shape.head_dim, width))
        self.post_attention_layernorm = _norm(width, shape.eps)
        self.gate_proj, self.up_proj = _linear(width, shape.inner_dim), _linear(width, shape.inner_dim)
        self.down_proj = starting_as("zero", _linear(shape.inner_dim, width))
        self.norm = _norm(width, shape.eps) if self.is_fused else nn.Identity()

    def add_inputs(self, shape: EagleShape, is_biased: bool) -> None:
        """What stands before the attention."""
        width, eps = shape.width, shape.eps
        self.fc = _linear(shape.features or 2 * width, width, is_biased)
        self.input_norm = _norm(shape.features, eps) if "fc" in self.norms else None
        self.fc_norm = None
        if "features" in self.norms:
            self.fc_norm = nn.ModuleList(
                _norm(shape.features // shape.n_features, eps) for _ in range(shape.n_features)
            )
        self.input_layernorm, self.hidden_norm = (_norm(width, eps) if self.is_fused else None for _ in range(2))

    @property
    def dtype(self) -> torch.dtype:
        return self.q_proj.weight.dtype

    def keep_rope_speeds(self, speeds: torch.Tensor) -> None:
        """(head_dim / 2,), angles of a position: kept bit by bit, as a cast to another dtype would round them."""
        self.rope_bits.copy_(speeds.float().view(torch.int32))

    def fused(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, n, features) -> (batch, n, width)."""
        features = features.to(self.dtype)
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(features)

    def read(
        self, hidden_states: torch.Tensor, tokens: torch.Tensor, features: torch.Tensor | None, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What true pairs bring to the attention; see `ContextLayer.read`."""
        if (features is None) == self.is_fused:
            wanted = "needs" if features is None else "has no use for"
            raise ValueError(f"This EAGLE layer {wanted} `features`, hidden states of inner layers.")
        return self.pair(self.fused(features) if self.is_fused else hidden_states, tokens, positions)

    def pair(
        self, features: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What pairs bring, whose features are true or guessed: (batch, n, width), and tokens' embeddings.

        Args:
            positions: (batch, n) or (1, n), of the features.

        Returns:
            What is added to, (batch, n, width); queries (batch, heads, n, head_dim), keys and values.
        """
        features, tokens = features.to(self.dtype), tokens.to(self.dtype)
        if self.is_fused:
            normed = self.hidden_norm(features)
            stream = normed if "residual" in self.norms else features
            read = torch.cat([self.input_layernorm(tokens), normed], dim=-1)
        else:
            stream = read = self.fc(torch.cat([tokens, features], dim=-1))
        return stream, *self.project(read, positions)

    def project(self, read: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values (batch, heads, n, head_dim) of what is read."""
        batch, n, _ = read.shape

        def split(states: torch.Tensor) -> torch.Tensor:
            return states.view(batch, n, -1, self.key_shape[1]).transpose(1, 2)

        query, key, value = (split(proj(read)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope_theta is None:
            speeds = self.rope_bits.view(torch.float32)
        else:
            speeds = rope_speeds(self.key_shape[1], self.rope_theta, query.device)
        return *rotated(query, key, positions, speeds, self.rope_scale), value

    def attend(
        self,
        hidden_states: torch.Tensor,
        stream: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The next features (batch, n, width), of true pairs; see `ContextLayer.attend`."""
        grouped = self.heads != self.key_shape[0]
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
        return self.finish(stream, attended)

    def attend_along(self, stream: torch.Tensor, query: torch.Tensor, seen, path: torch.Tensor) -> torch.Tensor:
        """The next features of drafted pairs, each of which attends to true ones and to those on its own path.

        Args:
            seen: `Seen`, the true ones.
            path: (batch, n, m, 2, kv_heads, head_dim), keys and values on each path, the pair's own the last.
        """
        batch, heads, n, dim = query.shape
        query = query.reshape(batch, self.key_shape[0], -1, n, dim)  # the query heads of a group beside one another
        scores = torch.einsum("bkgnd,bkcd->bkgnc", query, seen.keys.to(query.dtype))
        scores = scores.masked_fill(~seen.mask[:, None, None], -torch.inf)
        along = torch.einsum("bkgnd,bnmkd->bkgnm", query, path[:, :, :, 0])
        weights = (torch.cat([scores, along], dim=-1) * dim**-0.5).float().softmax(-1).to(query.dtype)
        weights, of_path = weights.split([scores.shape[-1], along.shape[-1]], dim=-1)
        attended = torch.einsum("bkgnc,bkcd->bkgnd", weights, seen.values.to(query.dtype))
        attended = attended + torch.einsum("bkgnm,bnmkd->bkgnd", of_path, path[:, :, :, 1])
        return self.finish(stream, attended.reshape(batch, heads, n, dim))

    def finish(self, stream: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What follows the attention: (batch, heads, n, head_dim) -> (batch, n, width)."""
        stream = stream + self.o_proj(attended.transpose(1, 2).flatten(2))
        read = self.post_attention_layernorm(stream)
        guess = stream + self.down_proj(F.silu(self.gate_proj(read)) * self.up_proj(read))
        return self.norm(guess) if "feedback" in self.norms else guess

    def scored(self, guess: torch.Tensor) -> torch.Tensor:
        """What the LM head reads of what `finish` has returned."""
        return guess if "feedback" in self.norms else self.norm(guess)


class PrefixLayer(EagleLayer):
    """Hydra++'s (arXiv 2402.05109, section 4.3): a pre-norm decoder layer over context vectors alone."""

    def add_inputs(self, shape: EagleShape, is_biased: bool) -> None:
        self.input_layernorm = _norm(shape.width, shape.eps)

    def read(
        self, hidden_states: torch.Tensor, tokens: torch.Tensor, features: torch.Tensor | None, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        stream = hidden_states.to(self.dtype)
        return stream, *self.project(self.input_layernorm(stream), positions)


def _linear(width_in: int, width_out: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(width_in, width_out, bias=bias)


def _norm(width: int, eps: float) -> nn.RMSNorm:
    return nn.RMSNorm(width, eps=eps)


__all__ = ["EXTRA_NORMS", "EagleLayer", "EagleShape", "PrefixLayer"]
