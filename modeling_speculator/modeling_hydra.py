"""Hydra heads (arXiv 2402.05109): Medusa's, told the tokens drafted before; and Hydra++'s, behind a decoder layer.

Here they stand beside the others: trained by the same trainers, verified by the same loop.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .cells import starting_as
from .configuration_mlp_speculator import MLPSpeculatorConfig
from .context_layer import OwnAttention
from .context_state import ContextState
from .context_vectors import mask_of_text
from .drafter_state import Call, DrafterState
from .eagle_layer import EagleShape, PrefixLayer
from .modeling_bound import BoundSpeculator, ReadingCell


class HydraConfig(OwnAttention, MLPSpeculatorConfig):
    """Dials as of `MLPSpeculatorConfig`; heads are as wide as the base model.

    Args:
        n_blocks: residual blocks of a head; Hydra++ has 4.
        prefix_layer: whether a decoder layer reads the context vectors first, as Hydra++'s does.
        context_heads: its attention heads; 0 means one for 64 numbers of `emb_dim`.
        rope_theta: of its rotary positions.

    Raises:
        ValueError: for what Hydra heads do not have.
    """

    model_type = "hydra_heads"
    methods = ("hydra",)

    method: str = "hydra"
    n_blocks: int = 1
    prefix_layer: bool = False
    context_heads: int = 0
    rope_theta: float = 10000.0

    def __post_init__(self, **kwargs):
        if self.inner_dim not in (0, self.emb_dim) or self.tie_weights or self.scale_input:
            raise ValueError(
                "Hydra heads are as wide as the base model and share nothing: drop `inner_dim`, `tie_weights` and "
                "`scale_input`."
            )
        super().__post_init__(**kwargs)
        if type(self.n_blocks) is not int or self.n_blocks < 1:
            raise ValueError(f"`n_blocks` must be an integer of at least 1, but is {self.n_blocks!r}.")
        self.check_attention("context_heads")


class HydraBlock(nn.Module):
    """`R x + silu(W x + b)`; where what it reads is no wider than what it makes, R is the identity."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.linear = starting_as("zero", nn.Linear(width_in, width))  # as Medusa's: what h says, as it is
        self.skip = nn.Identity()
        if width_in > width:
            self.skip = starting_as("identity", nn.Linear(width_in, width, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.skip(x) + F.silu(self.linear(x))


class HydraCell(ReadingCell):
    """Head i reads `[h; e_1 .. e_i]`, e_1 the root's embedding. A state is a head's features, then what it read."""

    def __init__(self, config: HydraConfig):
        super().__init__(config)
        width, heads = config.emb_dim, range(1, config.n_predict + 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                HydraBlock((1 + i) * width, width), *(HydraBlock(width, width) for _ in range(config.n_blocks - 1))
            )
            for i in heads
        )
        self.head = self.lm_heads(config)
        self.prefix = None
        if config.prefix_layer:
            n_heads = config.n_context_heads
            self.prefix = PrefixLayer(
                EagleShape(width, n_heads, n_heads, width // n_heads, 2 * width), config.rope_theta
            )
        self.reads_text = self.reads_prompt = config.prefix_layer

    def start(self, call: Call) -> DrafterState:
        return super().start(call) if self.prefix is None else ContextState(self.prefix, self._ends().embed, (), call)

    def with_context(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        features: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.prefix is None:
            return hidden_states
        places = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        mask = None if segments is None else mask_of_text(places, None, segments)
        return self.prefix.attend(hidden_states, *self.prefix.read(hidden_states, None, None, places[None]), mask=mask)

    def first_state(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.to(self.head[0].weight.dtype)

    def advance(self, head: int, state: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        read = state if head == 0 else state[..., self.inner_dim :]
        read = torch.cat([read, self._ends().embed(input_ids).to(read.dtype)], dim=-1)
        return torch.cat([self.blocks[head](read), read], dim=-1)


class HydraModel(BoundSpeculator):
    """Hydra heads as a speculator."""

    config_class = HydraConfig
    cells = {"hydra": HydraCell}


__all__ = ["HydraConfig", "HydraModel"]
