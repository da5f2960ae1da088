"""EAGLE (arXiv 2401.15077) and EAGLE-3 (arXiv 2503.01840): a layer for every drafted token, fed its own features.

Here they stand beside the others: trained by the same trainers, verified by the same loop. Each drafted path carries
its keys and values along in its state, so that nothing has to be taken back.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from .base_model_ends import BaseModelEnds
from .context_layer import OwnAttention
from .context_vectors import mask_of_text
from .drafter_state import Call
from .eagle_layer import EXTRA_NORMS, EagleLayer, EagleShape
from .eagle_state import EagleState, SeenInText
from .families import check_feature_layers
from .modeling_bound import BoundCell, BoundConfig, BoundSpeculator


class EagleConfig(OwnAttention, BoundConfig):
    """Dials as of `BoundConfig`; `inner_dim` is the width of the layer's SwiGLU, 0 for twice `emb_dim`.

    Args:
        context_heads: attention heads of the layer; 0 means one for 64 numbers of `emb_dim`.
        context_kv_heads: heads of its keys and values; 0 means as many.
        rope_theta: of its rotary positions.
        feature_layers: layers of the base model, counted from 0, what enters which is read (EAGLE-3 takes 2, L // 2
            and L - 3 of L layers); empty, context vectors are (EAGLE).

    What only published checkpoints say (`published_drafters.py`), at its defaults in those that are trained here:

    Args:
        layer_dim: width of the layer; 0 means `emb_dim`.
        context_head_dim: width of its heads; 0 means `layer_dim / context_heads`.
        rms_norm_eps: of its norms.
        own_rope: whether the checkpoint holds the angles of its rotary positions; `rope_scale` is their scale.
        biases: of the projections "fc" and "qkv", those with a bias; by default fc's, where it reads context vectors.
        extra_norms: of "fc", "features", "residual" and "feedback" (`eagle_layer.EXTRA_NORMS`).
        own_embeddings, own_lm_head: whether it has such, in place of the base model's; an LM head scores the
            `draft_vocabulary`, which is no dial then.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    model_type = "eagle_speculator"
    methods = ("eagle",)

    method: str = "eagle"
    context_heads: int = 0
    context_kv_heads: int = 0
    rope_theta: float = 10000.0
    feature_layers: list[int] | None = None
    layer_dim: int = 0
    context_head_dim: int = 0
    rms_norm_eps: float = 1e-6
    own_rope: bool = False
    rope_scale: float = 1.0
    biases: list[str] | None = None
    extra_norms: list[str] | None = None
    own_embeddings: bool = False
    own_lm_head: bool = False

    def __post_init__(self, **kwargs):
        if self.tie_weights or self.scale_input:
            raise ValueError("EAGLE has one layer for all tokens: drop `tie_weights` and `scale_input`.")
        super().__post_init__(**kwargs)
        self.check_attention("context_heads", "context_kv_heads", "layer_dim", "context_head_dim")
        self.check_feature_layers(may_repeat=True)  # of a small model, EAGLE-3's three are not three
        self.biases = (["fc"] if not self.feature_layers else []) if self.biases is None else list(self.biases)
        self.extra_norms = list(self.extra_norms or ())
        for name, known in (("biases", ("fc", "qkv")), ("extra_norms", tuple(EXTRA_NORMS))):
            if not set(getattr(self, name)) <= set(known):
                raise ValueError(f"`{name}` can hold {', '.join(known)}, but is {getattr(self, name)!r}.")
        if self.extra_norms and not self.feature_layers:
            raise ValueError("`extra_norms` go with `feature_layers`: without them EAGLE has no norm of its own.")
        if self.layer_dim not in (0, self.emb_dim) and not (self.own_embeddings and self.own_lm_head):
            raise ValueError("A layer of another width than the base model's needs its own embeddings and LM head.")
        if self.n_context_heads % (self.context_kv_heads or 1):
            raise ValueError(
                f"`context_kv_heads={self.context_kv_heads}` must divide the {self.n_context_heads} `context_heads`."
            )

    @property
    def context_width(self) -> int:
        return self.layer_dim or self.emb_dim

    @property
    def shape(self) -> EagleShape:
        width, heads, n_features = self.context_width, self.n_context_heads, len(self.feature_layers)
        return EagleShape(
            width=width,
            heads=heads,
            kv_heads=self.context_kv_heads or heads,
            head_dim=self.context_head_dim or width // heads,
            inner_dim=self.inner_dim or 2 * width,
            features=n_features * self.emb_dim,
            n_features=n_features,
            eps=self.rms_norm_eps,
        )


class EagleCell(BoundCell):
    """A state is a guessed feature, then the keys and values of the pairs on the path to it.

    Attributes:
        embed_tokens, own_head, own_ids: its own, with the ids that the head scores; None where the base model's are
            read.
        seen: the true pairs that drafts attend to; None but in what `bound` returns.
    """

    reads_text = reads_prompt = True

    def __init__(self, config: EagleConfig):
        super().__init__(config)
        self.feature_layers, self.seen = tuple(config.feature_layers), None
        shape, rope_theta = config.shape, None if config.own_rope else config.rope_theta
        self.inner_dim = shape.width
        self.layer = EagleLayer(shape, rope_theta, config.rope_scale, config.biases, config.extra_norms)
        self.embed_tokens = nn.Embedding(config.vocab_size, shape.width) if config.own_embeddings else None
        n_scored = len(config.draft_vocabulary or range(config.vocab_size))
        self.own_head = nn.Linear(shape.width, n_scored, bias=False) if config.own_lm_head else None
        has_ids = config.own_lm_head and config.draft_vocabulary is not None
        self.register_buffer("own_ids", torch.zeros(n_scored, dtype=torch.long) if has_ids else None)

    @property
    def copied_per_place(self) -> int:
        return 0 if self.seen is None else 2 * self.seen.keys[0].numel()

    def check_base_model(self, base_model: PreTrainedModel) -> None:
        BaseModelEnds(base_model, self.vocab_size).check(self.sketch, self.sketch_rows)
        check_feature_layers(base_model, self.feature_layers)
        if self.own_head is None:
            self.check_draft_vocabulary(base_model)
        elif len(self.config.draft_vocabulary or range(self.vocab_size)) != self.own_head.out_features:
            raise ValueError(
                "`draft_vocabulary` is no dial of a drafter with an LM head of its own, which scores "
                f"{self.own_head.out_features} tokens: leave it as it was loaded."
            )

    def bound(self, base_model: PreTrainedModel) -> "EagleCell":
        return super().bound(base_model) if self.own_head is None else self.bound_to(base_model)

    def start(self, call: Call) -> EagleState:
        self.seen = EagleState(self.layer, self.embed, self.feature_layers, call)
        return self.seen

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., width), without a gradient."""
        if self.embed_tokens is None:
            return self._ends().embed(input_ids)
        return self.embed_tokens(input_ids.clamp(max=self.vocab_size - 1)).detach()

    def with_context(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        features: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        places = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        mask = mask_of_text(places, None, segments)
        tokens = self.embed(input_ids)
        stream, query, key, value = self.layer.read(hidden_states, tokens, features, places[None])
        self.seen = SeenInText(key, value, mask[:, 0])
        return self.layer.attend(hidden_states, stream, query, key, value, mask if segments is not None else None)

    def between(self, start: int, end: int, n: int) -> "EagleCell":
        cell = copy.copy(self)
        cell.seen = self.seen.between(start, end, n)
        return cell

    def at_places(self, rows: torch.Tensor, places: torch.Tensor, n: int) -> "EagleCell":
        cell = copy.copy(self)
        cell.seen = self.seen.at(rows, places, n)
        return cell

    def first_state(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.to(self.layer.dtype)

    def advance(self, head: int, state: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        if head == 0:  # the pair of the root has been through the layer, among the true ones
            return state
        batch, n, _ = state.shape
        seen, width = self.seen.by(n), self.inner_dim
        tokens = self.embed(input_ids)
        stream, query, key, value = self.layer.pair(state[..., :width], tokens, seen.positions + head)
        own = torch.stack([key, value]).permute(1, 3, 0, 2, 4)  # (batch, n, 2, kv_heads, head_dim)
        path = torch.cat([state[..., width:].view(batch, n, head - 1, *own.shape[2:]), own[:, :, None]], dim=2)
        return torch.cat([self.layer.attend_along(stream, query, seen, path), path.flatten(2)], dim=-1)

    def features(self, state: torch.Tensor) -> torch.Tensor:
        scored = self.layer.scored(state[..., : self.inner_dim])
        return super().features(scored) if self.own_head is None else scored

    def lm_head(self, head: int) -> Callable[[torch.Tensor], torch.Tensor]:
        if self.own_head is None:
            return super().lm_head(head)
        return self.own_head if self.own_ids is None else self._all_logits

    def _all_logits(self, features: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., vocab): of what is never drafted there are none."""
        logits = self.own_head(features)
        impossible = logits.new_full((*logits.shape[:-1], self.vocab_size), -torch.inf)
        return impossible.index_copy(-1, self.own_ids, logits)

    def draft_head(self, head: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor | None]:
        return super().draft_head(head) if self.own_head is None else (self.own_head, self.own_ids)

    def draft_logits(
        self, head: int, features: torch.Tensor, vocab_size: int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.own_ids is None:
            return super().draft_logits(head, features, vocab_size)
        logits = self.own_head(features)
        if vocab_size is not None:
            logits = logits.masked_fill(self.own_ids >= vocab_size, -torch.inf)
        return logits, self.own_ids

    def resize_vocabulary(self, vocab_size: int, fill) -> None:
        if self.embed_tokens is not None or self.own_head is not None:
            raise ValueError("This drafter has embeddings or an LM head of a checkpoint, which stay as they are.")
        super().resize_vocabulary(vocab_size, fill)


class EagleSpeculator(BoundSpeculator):
    """An EAGLE layer as a speculator."""

    config_class = EagleConfig
    cells = {"eagle": EagleCell}


__all__ = ["EagleConfig", "EagleSpeculator"]
