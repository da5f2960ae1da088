"""Medusa heads (arXiv 2401.10774, section 3.1): each guesses from the context vector alone.

Here they stand beside the MLP speculator: trained by the same trainers, verified by the same loop.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init

from .base_model_ends import lm_head_weight
from .cells import Cell
from .configuration_mlp_speculator import MLPSpeculatorConfig
from .modeling_mlp_speculator import MLPSpeculatorPreTrainedModel


class MedusaConfig(MLPSpeculatorConfig):
    """Shape and dials of Medusa heads: those of `MLPSpeculatorConfig`; `inner_dim` is the base model's.

    Raises:
        ValueError: for what Medusa heads do not have.
    """

    model_type = "medusa_heads"
    methods = ("medusa",)

    method: str = "medusa"

    def __post_init__(self, **kwargs):
        if self.inner_dim not in (0, self.emb_dim) or self.tie_weights or self.scale_input:
            raise ValueError(
                "Medusa heads are as wide as the base model and share nothing: drop `inner_dim`, `tie_weights` and "
                "`scale_input`."
            )
        super().__post_init__(**kwargs)


class MedusaHeads(Cell):
    """Head i: `W2 (h + silu(W1 h + b))`. A state is a head's features and the context vector, one after the other."""

    reads_tokens = False

    def __init__(self, config: MedusaConfig):
        super().__init__(config)
        self.proj = nn.ModuleList(nn.Linear(self.inner_dim, self.inner_dim) for _ in range(config.n_predict))
        self.head = self.lm_heads(config)

    def advance(self, head: int, state: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        context_vector = state[..., -self.inner_dim :]
        return torch.cat([context_vector + F.silu(self.proj[head](context_vector)), context_vector], dim=-1)

    @torch.no_grad()
    def start_from(self, base_model: PreTrainedModel) -> None:
        """Every head starts as the base model's LM head (but for a bias or a soft cap), for W1 and b start at zero."""
        for head in self.head:
            head.weight.copy_(lm_head_weight(base_model))


class MedusaModel(MLPSpeculatorPreTrainedModel):
    """Medusa heads as a speculator: load them with `from_pretrained`, draft with `generate(assistant_model=...)`."""

    config_class = MedusaConfig
    cells = {"medusa": MedusaHeads}

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


__all__ = ["MedusaConfig", "MedusaModel"]
