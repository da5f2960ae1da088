"""ReDrafter (arXiv 2403.09919): a recurrent cell over the drafted tokens, beside the context vector.

Here it stands beside the others: trained by the same trainers, verified by the same loop. Its paper drafts the most
probable paths by beam search; here the dials' rules choose them.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .cells import starting_as
from .configuration_mlp_speculator import MLPSpeculatorConfig
from .modeling_bound import BoundSpeculator, ReadingCell


class ReDrafterConfig(MLPSpeculatorConfig):
    """Dials as of `MLPSpeculatorConfig`; the cell is as wide as the base model, and all heads are one.

    Args:
        n_blocks: residual blocks between the cell and its LM head.

    Raises:
        ValueError: for what it does not have.
    """

    model_type = "redrafter"
    methods = ("redrafter",)

    method: str = "redrafter"
    n_blocks: int = 2

    def __post_init__(self, **kwargs):
        if self.inner_dim not in (0, self.emb_dim) or self.tie_weights or self.scale_input:
            raise ValueError(
                "ReDrafter has one head, as wide as the base model: drop `inner_dim`, `tie_weights` and `scale_input`."
            )
        super().__post_init__(**kwargs)
        if type(self.n_blocks) is not int or self.n_blocks < 0:
            raise ValueError(f"`n_blocks` must be an integer of at least 0, but is {self.n_blocks!r}.")


class ReDrafterCell(ReadingCell):
    """`s' = silu(U s + W e + b)`, s_0 = 0, e_1 the embedding of the root; blocks `x + silu(V x + c)` on `[h; s]`, then
    an LM head. A state is `[h; s]`."""

    def __init__(self, config: ReDrafterConfig):
        super().__init__(config)
        width = config.emb_dim
        self.proj_state = nn.Linear(width, width, bias=False)
        self.proj_token = nn.Linear(width, width)
        blocks = range(config.n_blocks)
        self.blocks = nn.ModuleList(starting_as("zero", nn.Linear(2 * width, 2 * width)) for _ in blocks)
        self.head = nn.ModuleList([nn.Linear(2 * width, config.vocab_size, bias=False)])

    def lm_head(self, head: int) -> nn.Linear:
        return self.head[0]

    def first_state(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states.to(self.head[0].weight.dtype)
        return torch.cat([hidden_states, torch.zeros_like(hidden_states)], dim=-1)

    def advance(self, head: int, state: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        context_vector, recurrent = state.chunk(2, dim=-1)
        token = self._ends().embed(input_ids).to(state.dtype)
        return torch.cat([context_vector, F.silu(self.proj_state(recurrent) + self.proj_token(token))], dim=-1)

    def features(self, state: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            state = state + F.silu(block(state))
        return state


class ReDrafterModel(BoundSpeculator):
    """A ReDrafter cell as a speculator."""

    config_class = ReDrafterConfig
    cells = {"redrafter": ReDrafterCell}


__all__ = ["ReDrafterConfig", "ReDrafterModel"]
