"""A speculator whose heads each add to the context vector, by what the last token says."""

import torch
from torch import nn
from transformers import initialization as init

from .cells import starting_as
from .modeling_bound import BoundCell, BoundConfig, BoundSpeculator


class ResidualConfig(BoundConfig):
    """Shape and dials as of `BoundConfig`: `inner_dim` is the width within a head, `tie_weights` shares one head.

    Raises:
        ValueError: for `scale_input`, which it does not have.
    """

    model_type = "residual_speculator"
    methods = ("residual",)

    method: str = "residual"

    def __post_init__(self, **kwargs):
        if self.scale_input:
            raise ValueError('`method="residual"` adds to the context vector as it is: drop `scale_input`.')
        super().__post_init__(**kwargs)


class ResidualCell(BoundCell):
    """`s_{i+1} = s_i + W2_i silu(W1_i [norm_i(s_i); norm'_i(E[token_i])])`, s_0 the context vector; E and the LM head
    that reads s_{i+1} are the base model's. W2 starts at zero."""

    def __init__(self, config: ResidualConfig):
        super().__init__(config)
        width, heads = config.inner_dim or config.emb_dim, range(config.n_predict)
        self.proj_in = nn.ModuleList(nn.Linear(2 * config.emb_dim, width, bias=False) for _ in heads)
        self.proj_out = nn.ModuleList(starting_as("zero", nn.Linear(width, config.emb_dim, bias=False)) for _ in heads)
        self.state_norm, self.token_norm = (
            nn.ModuleList(nn.RMSNorm(config.emb_dim, eps=1e-5) for _ in heads) for _ in range(2)
        )

    def first_state(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.to(self.proj_in[0].weight.dtype)

    def advance(self, head: int, state: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        token = self._ends().embed(input_ids).to(state.dtype)
        read = torch.cat([self.state_norm[head](state), self.token_norm[head](token)], dim=-1)
        return state + self.proj_out[head](nn.functional.silu(self.proj_in[head](read)))

    @staticmethod
    def tied_weights(n_predict: int) -> dict[str, str]:
        names = ("proj_in", "proj_out", "state_norm", "token_norm")
        return {f"{name}.{head}.weight": f"{name}.0.weight" for head in range(1, n_predict) for name in names}


class ResidualSpeculator(BoundSpeculator):
    """A residual cell as a speculator."""

    config_class = ResidualConfig
    cells = {"residual": ResidualCell}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and not hasattr(module, "starts_as"):
            init.normal_(module.weight, std=(self.config.inner_dim or self.config.emb_dim) ** -0.5)
        else:
            super()._init_weights(module)


__all__ = ["ResidualConfig", "ResidualSpeculator"]
