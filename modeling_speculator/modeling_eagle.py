"""EAGLE (arXiv 2401.15077) and EAGLE-3 (arXiv 2503.01840): a layer for every drafted token, fed its own features.

Here they stand beside the others: trained by the same trainers, verified by the same loop. Each drafted path carries
its keys and values along in its state, so that nothing has to be taken back.
"""

import copy

import torch
from transformers import PreTrainedModel

from .context_layer import OwnAttention
from .context_vectors import mask_of_text
from .drafter_state import Call
from .eagle_layer import EagleLayer
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

    def __post_init__(self, **kwargs):
        if self.tie_weights or self.scale_input:
            raise ValueError("EAGLE has one layer for all tokens: drop `tie_weights` and `scale_input`.")
        super().__post_init__(**kwargs)
        self.check_attention("context_heads", "context_kv_heads")
        self.check_feature_layers()
        if self.n_context_heads % (self.context_kv_heads or 1):
            raise ValueError(
                f"`context_kv_heads={self.context_kv_heads}` must divide the {self.n_context_heads} `context_heads`."
            )


class EagleCell(BoundCell):
    """A state is a guessed feature, then the keys and values of the pairs on the path to it.

    Attributes:
        seen: the true pairs that drafts attend to; None but in what `bound` returns.
    """

    reads_text = reads_prompt = True

    def __init__(self, config: EagleConfig):
        super().__init__(config)
        width, heads = config.emb_dim, config.n_context_heads
        self.feature_layers, self.seen = tuple(config.feature_layers), None
        sizes = width, heads, config.context_kv_heads or heads, width // heads, config.inner_dim or 2 * width
        self.layer = EagleLayer(*sizes, len(self.feature_layers), config.rope_theta)

    @property
    def copied_per_place(self) -> int:
        return 0 if self.seen is None else 2 * self.seen.keys[0].numel()

    def check_base_model(self, base_model: PreTrainedModel) -> None:
        super().check_base_model(base_model)
        check_feature_layers(base_model, self.feature_layers)

    def start(self, call: Call) -> EagleState:
        self.seen = EagleState(self.layer, self._ends(), self.feature_layers, call)
        return self.seen

    def with_context(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        features: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        places = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        mask = mask_of_text(places, None, segments)
        tokens = self._ends().embed(input_ids)
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
        tokens = self._ends().embed(input_ids)
        stream, query, key, value = self.layer.pair(state[..., :width], tokens, seen.positions + head)
        own = torch.stack([key, value]).permute(1, 3, 0, 2, 4)  # (batch, n, 2, kv_heads, head_dim)
        path = torch.cat([state[..., width:].view(batch, n, head - 1, *own.shape[2:]), own[:, :, None]], dim=2)
        return torch.cat([self.layer.attend_along(stream, query, seen, path), path.flatten(2)], dim=-1)

    def features(self, state: torch.Tensor) -> torch.Tensor:
        return super().features(self.layer.norm(state[..., : self.inner_dim]))


class EagleSpeculator(BoundSpeculator):
    """An EAGLE layer as a speculator."""

    config_class = EagleConfig
    cells = {"eagle": EagleCell}


__all__ = ["EagleConfig", "EagleSpeculator"]
