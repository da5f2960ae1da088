"""EAGLE's layer: a decoder layer over pairs of a feature and the token after it, whose output is the next feature."""

import torch
from torch import nn
from torch.nn import functional as F

from .cells import starting_as
from .context_layer import rotated


class EagleLayer(nn.Module):
    """Pair t is a feature f_t and the embedding of token t + 1; the layer guesses f_{t+1}.

    EAGLE (arXiv 2401.15077, section 4.1), where `n_features` is 0: f_t is the context vector; `fc [embedding; f_t]` is
    what enters the layer, without a norm before its attention.
    EAGLE-3 (arXiv 2503.01840, section 3.1): f_t is `fc` of what enters some layers of the base model, one after the
    other; queries, keys and values read `[norm(embedding); norm(f_t)]`, and what is added to is f_t.

    The names of the modules are those of EAGLE-3's published checkpoints.

    Args:
        width: of features.
        heads, kv_heads, head_dim: of its attention.
        inner_dim: of its SwiGLU.
        n_features: hidden states of inner layers of each token; 0 for none.
        rope_theta: of the rotary positions.
    """

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_dim: int, inner_dim: int, n_features: int, rope_theta: float
    ):
        super().__init__()
        self.heads, self.key_shape, self.rope_theta = heads, (kv_heads, head_dim), rope_theta
        self.is_fused = n_features > 0
        read = 2 * width if self.is_fused else width
        self.fc = nn.Linear((n_features or 2) * width, width, bias=not self.is_fused)
        self.input_layernorm = _norm(width) if self.is_fused else None
        self.hidden_norm = _norm(width) if self.is_fused else None
        self.q_proj = _linear(read, heads * head_dim)
        self.k_proj, self.v_proj = (_linear(read, kv_heads * head_dim) for _ in range(2))
        self.o_proj = starting_as("zero", _linear(heads * head_dim, width))
        self.post_attention_layernorm = _norm(width)
        self.gate_proj, self.up_proj = _linear(width, inner_dim), _linear(width, inner_dim)
        self.down_proj = starting_as("zero", _linear(inner_dim, width))
        self.norm = _norm(width) if self.is_fused else nn.Identity()

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    def read(
        self, hidden_states: torch.Tensor, tokens: torch.Tensor, features: torch.Tensor | None, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What true pairs bring to the attention; see `ContextLayer.read`."""
        if (features is None) == self.is_fused:
            wanted = "needs" if features is None else "has no use for"
            raise ValueError(f"This EAGLE layer {wanted} `features`, hidden states of inner layers.")
        return self.pair(self.fc(features.to(self.dtype)) if self.is_fused else hidden_states, tokens, positions)

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
            stream, read = features, torch.cat([self.input_layernorm(tokens), self.hidden_norm(features)], dim=-1)
        else:
            stream = read = self.fc(torch.cat([tokens, features], dim=-1))
        return stream, *self.project(read, positions)

    def project(self, read: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values (batch, heads, n, head_dim) of what is read."""
        batch, n, _ = read.shape

        def split(states: torch.Tensor) -> torch.Tensor:
            return states.view(batch, n, -1, self.key_shape[1]).transpose(1, 2)

        query, key, value = (split(proj(read)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return *rotated(query, key, positions, self.rope_theta), value

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
        return stream + self.down_proj(F.silu(self.gate_proj(read)) * self.up_proj(read))


class PrefixLayer(EagleLayer):
    """Hydra++'s (arXiv 2402.05109, section 4.3): a pre-norm decoder layer over context vectors alone."""

    def __init__(self, width: int, heads: int, inner_dim: int, rope_theta: float):
        super().__init__(width, heads, heads, width // heads, inner_dim, 0, rope_theta)
        self.fc, self.input_layernorm = None, _norm(width)

    @property
    def dtype(self) -> torch.dtype:
        return self.q_proj.weight.dtype

    def read(
        self, hidden_states: torch.Tensor, tokens: torch.Tensor, features: torch.Tensor | None, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        stream = hidden_states.to(self.dtype)
        return stream, *self.project(self.input_layernorm(stream), positions)


def _linear(width_in: int, width_out: int) -> nn.Linear:
    return nn.Linear(width_in, width_out, bias=False)


def _norm(width: int) -> nn.RMSNorm:
    return nn.RMSNorm(width, eps=1e-6)


__all__ = ["EagleLayer", "PrefixLayer"]
