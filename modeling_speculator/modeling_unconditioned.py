"""The MLP speculator without its tokens: what conditioning on them is worth (arXiv 2404.19124, section 2)."""

import torch
from torch import nn
from torch.nn import functional as F

from .cells import Cell, MLPSpeculatorRMSNorm
from .configuration_mlp_speculator import MLPSpeculatorConfig
from .modeling_mlp_speculator import MLPSpeculatorPreTrainedModel


class UnconditionedConfig(MLPSpeculatorConfig):
    """Shape and dials as of `MLPSpeculatorConfig`.

    Raises:
        ValueError: for tied weights, which this ablation does not have.
    """

    model_type = "unconditioned_speculator"
    methods = ("unconditioned",)

    method: str = "unconditioned"

    def __post_init__(self, **kwargs):
        if self.tie_weights:
            raise ValueError('`method="unconditioned"` has no tied form: drop `tie_weights`.')
        super().__post_init__(**kwargs)


class Unconditioned(Cell):
    """The published recurrence with nothing in place of the tokens' embeddings."""

    reads_tokens = False

    def __init__(self, config: UnconditionedConfig):
        super().__init__(config)
        heads, inner_dim = range(config.n_predict), self.inner_dim
        self.proj = nn.ModuleList(nn.Linear(inner_dim if i else config.emb_dim, inner_dim, bias=False) for i in heads)
        self.head = self.lm_heads(config)
        self.ln = nn.ModuleList(MLPSpeculatorRMSNorm(inner_dim) for _ in heads)

    def advance(self, head: int, state: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.ln[head](self.proj[head](state)))


class UnconditionedSpeculator(MLPSpeculatorPreTrainedModel):
    """The ablation as a speculator."""

    config_class = UnconditionedConfig
    cells = {"unconditioned": Unconditioned}


__all__ = ["UnconditionedConfig", "UnconditionedSpeculator"]
