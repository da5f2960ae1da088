"""A speculator without a vocabulary of its own: each head adds to the context vector, and the base model's embeddings
and LM head read and score the tokens."""

import bisect
import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .base_model_ends import BaseModelEnds
from .cells import Cell
from .configuration_mlp_speculator import MLPSpeculatorConfig
from .modeling_mlp_speculator import MLPSpeculatorPreTrainedModel


class ResidualConfig(MLPSpeculatorConfig):
    """Shape and dials as of `MLPSpeculatorConfig`; `inner_dim` is the width within a head, `tie_weights` shares one
    among them.

    Args:
        draft_vocabulary: if set, the ids that are drafted, in ascending order: what the LM head need not score is left
            out (FR-Spec, arXiv 2502.14856). Read at each call; recipes/draft_vocabulary.py chooses them.

    Raises:
        ValueError: for `scale_input`, which it does not have, or ids that are not in order, double or too large.
    """

    model_type = "residual_speculator"
    methods = ("residual",)

    method: str = "residual"
    draft_vocabulary: list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.scale_input:
            raise ValueError('`method="residual"` adds to the context vector as it is: drop `scale_input`.')
        self.check_draft_vocabulary()
        super().__post_init__(**kwargs)

    def check_draft_vocabulary(self) -> None:
        """Raises a ValueError for ids that are not in order, double or too large."""
        ids = self.draft_vocabulary
        if ids is None:
            return
        if not ids or any(type(at) is not int for at in ids) or sorted(set(ids)) != list(ids) or ids[0] < 0:
            raise ValueError("`draft_vocabulary` must hold token ids in ascending order, each of them once.")
        if ids[-1] >= self.vocab_size:
            raise ValueError(
                f"`draft_vocabulary` holds the id {ids[-1]}, but there are only {self.vocab_size} (`vocab_size`)."
            )

    def check_dials(self, *dials, vocab_size: int | None = None, **named_dials) -> None:
        ids = self.draft_vocabulary
        if ids is not None:  # of which no more can be drafted
            vocab_size = len(ids) if vocab_size is None else bisect.bisect_left(ids, vocab_size)
        super().check_dials(*dials, vocab_size=vocab_size, **named_dials)


class ResidualCell(Cell):
    """`s_{i+1} = s_i + W2 silu(W1 [norm(s_i); norm'(E[token])])`, s_0 the context vector; E and the LM head that reads
    s_{i+1} are the base model's. W2 starts at zero.

    Attributes:
        ends, draft_rows: the base model's embeddings and LM head, and that part of it which scores what is drafted;
            None but in what `bound` returns.
    """

    needs_base_model = True

    def __init__(self, config: ResidualConfig):
        nn.Module.__init__(self)
        self.inner_dim, width, heads = config.emb_dim, config.inner_dim or config.emb_dim, range(config.n_predict)
        self.config, self.vocab_size = config, config.vocab_size
        self.ends = self.draft_rows = None
        self.proj_in = nn.ModuleList(nn.Linear(2 * config.emb_dim, width, bias=False) for _ in heads)
        self.proj_out = nn.ModuleList(nn.Linear(width, config.emb_dim, bias=False) for _ in heads)
        self.state_norm, self.token_norm = (
            nn.ModuleList(nn.RMSNorm(config.emb_dim, eps=1e-5) for _ in heads) for _ in range(2)
        )
        self.register_buffer("sketch", torch.zeros(BaseModelEnds.SKETCH))
        self.register_buffer("sketch_rows", torch.zeros(BaseModelEnds.SKETCH[0], dtype=torch.long))

    def bound(self, base_model: PreTrainedModel) -> "ResidualCell":
        cell = copy.copy(self)  # the parameters are shared; nothing of the base model is kept in the module
        cell.ends, ids = BaseModelEnds(base_model, self.vocab_size), self.config.draft_vocabulary
        cell.draft_rows = None if ids is None else cell.ends.draft_rows(ids)
        return cell

    def check_base_model(self, base_model: PreTrainedModel) -> None:
        ends = BaseModelEnds(base_model, self.vocab_size)
        ends.check(self.sketch, self.sketch_rows)
        if self.config.draft_vocabulary is not None:
            self.config.check_draft_vocabulary()
            ends.draft_rows(self.config.draft_vocabulary)

    def start_from(self, base_model: PreTrainedModel) -> None:
        """Remembers by what its embeddings are recognised."""
        self.sketch_rows.copy_(torch.arange(len(self.sketch_rows)) * self.vocab_size // len(self.sketch_rows))
        sketch = BaseModelEnds(base_model, self.vocab_size).sketch(self.sketch_rows)
        if sketch is not None:
            self.sketch.copy_(sketch)

    def first_state(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.to(self.proj_in[0].weight.dtype)

    def advance(self, head: int, state: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        token = self._ends().embed(input_ids).to(state.dtype)
        read = torch.cat([self.state_norm[head](state), self.token_norm[head](token)], dim=-1)
        return state + self.proj_out[head](nn.functional.silu(self.proj_in[head](read)))

    def features(self, state: torch.Tensor) -> torch.Tensor:
        return state.to(self._ends().base_model.dtype)

    def lm_head(self, head: int):
        return self._ends().lm_head

    def draft_head(self, head: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor | None]:
        if self.draft_rows is None:
            return super().draft_head(head)
        return self._ends().draft_head(self.draft_rows), self.draft_rows.ids

    def draft_logits(
        self, head: int, features: torch.Tensor, vocab_size: int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.draft_rows is None:
            return super().draft_logits(head, features, vocab_size)
        return self._ends().draft_logits(features, self.draft_rows), self.draft_rows.ids

    def _ends(self) -> BaseModelEnds:
        if self.ends is None:
            raise ValueError(
                "This speculator reads and scores tokens by its base model: pass `base_model` to its forward, or "
                "draft with `base_model.generate(assistant_model=speculator)`."
            )
        return self.ends

    def resize_vocabulary(self, vocab_size: int, fill) -> None:
        self.vocab_size = vocab_size

    @staticmethod
    def tied_weights(n_predict: int) -> dict[str, str]:
        names = ("proj_in", "proj_out", "state_norm", "token_norm")
        return {f"{name}.{head}.weight": f"{name}.0.weight" for head in range(1, n_predict) for name in names}


class ResidualSpeculator(MLPSpeculatorPreTrainedModel):
    """A residual cell as a speculator: it drafts for the base model that it was trained beside, and no other."""

    config_class = ResidualConfig
    cells = {"residual": ResidualCell}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, ResidualCell):
            init.zeros_(module.sketch)
            init.zeros_(module.sketch_rows)
            for linear in module.proj_out:
                init.zeros_(linear.weight)
        elif not isinstance(module, nn.Linear) or module.in_features == 2 * self.config.emb_dim:
            super()._init_weights(module)


__all__ = ["ResidualConfig", "ResidualSpeculator"]
