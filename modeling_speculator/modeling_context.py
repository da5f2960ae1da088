"""A residual speculator behind a context layer: its heads start from vectors that have attended to the text."""

import torch
from transformers import PreTrainedModel

from .context_layer import ContextLayer, OwnAttention
from .context_state import ContextState
from .drafter_state import Call
from .families import check_feature_layers
from .modeling_residual import ResidualCell, ResidualConfig, ResidualSpeculator


class ContextConfig(OwnAttention, ResidualConfig):
    """Shape and dials as of `ResidualConfig`.

    Args:
        context_heads: attention heads of the layer; 0 means one for 64 numbers of `emb_dim`.
        context_inner_dim: width of the layer's SwiGLU; 0 means twice `emb_dim`.
        rope_theta: of its rotary positions.
        feature_layers: layers of the base model, counted from 0, that the layer reads what enters of; empty, it reads
            context vectors. (EAGLE-3, arXiv 2503.01840, takes 2, L // 2 and L - 3 of L layers.)

    Raises:
        ValueError: for sizes that do not fit together.
    """

    model_type = "context_speculator"
    methods = ("context",)

    method: str = "context"
    context_heads: int = 0
    context_inner_dim: int = 0
    rope_theta: float = 10000.0
    feature_layers: list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check_attention("context_heads", "context_inner_dim")
        self.check_feature_layers()


class ContextCell(ResidualCell):
    """A residual cell whose first state is a context vector that has been through a context layer."""

    reads_text = reads_prompt = True

    def __init__(self, config: ContextConfig):
        super().__init__(config)
        width, self.feature_layers = config.emb_dim, tuple(config.feature_layers)
        inner_dim = config.context_inner_dim or 2 * width
        self.context = ContextLayer(
            width, config.n_context_heads, inner_dim, len(self.feature_layers), config.rope_theta
        )

    def check_base_model(self, base_model: PreTrainedModel) -> None:
        super().check_base_model(base_model)
        check_feature_layers(base_model, self.feature_layers)

    def start(self, call: Call) -> ContextState:
        return ContextState(self.context, self._ends().embed, self.feature_layers, call)

    def with_context(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        features: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        mask = None
        if segments is not None:
            mask = (segments[:, None] == segments[:, :, None]).tril()[:, None]
        tokens = self._ends().embed(input_ids)
        return self.context.attend(
            hidden_states, *self.context.read(hidden_states, tokens, features, positions), mask=mask
        )


class ContextSpeculator(ResidualSpeculator):
    """A context cell as a speculator."""

    config_class = ContextConfig
    cells = {"context": ContextCell}


__all__ = ["ContextConfig", "ContextSpeculator"]
