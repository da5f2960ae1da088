"""Speculators without a vocabulary of their own: the base model's embeddings and LM head read and score the tokens."""

import bisect
import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .base_model_ends import BaseModelEnds, lm_head_weight
from .cells import Cell
from .configuration_mlp_speculator import MLPSpeculatorConfig
from .modeling_mlp_speculator import MLPSpeculatorPreTrainedModel


class BoundConfig(MLPSpeculatorConfig):
    """Dials as of `MLPSpeculatorConfig`.

    Args:
        draft_vocabulary: if set, the ids that are drafted, in ascending order: what the LM head need not score is left
            out (FR-Spec, arXiv 2502.14856). Read at each call; recipes/draft_vocabulary.py chooses them.

    Raises:
        ValueError: for ids that are not in order, double or too large.
    """

    methods = ()  # those that are bound have a name each

    draft_vocabulary: list[int] | None = None

    def __post_init__(self, **kwargs):
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


class BoundCell(Cell):
    """What all cells share that use the embeddings and the LM head of the base model of a call, and no other's.

    Attributes:
        ends, draft_rows: the base model's embeddings and LM head, and that part of it which scores what is drafted;
            None but in what `bound` returns.
    """

    needs_base_model = True

    def __init__(self, config: BoundConfig):
        nn.Module.__init__(self)
        self.config, self.vocab_size, self.inner_dim = config, config.vocab_size, config.emb_dim
        self.ends = self.draft_rows = None
        self.register_buffer("sketch", torch.zeros(BaseModelEnds.SKETCH))
        self.register_buffer("sketch_rows", torch.zeros(BaseModelEnds.SKETCH[0], dtype=torch.long))

    def bound(self, base_model: PreTrainedModel) -> "BoundCell":
        cell, ids = self.bound_to(base_model), getattr(self.config, "draft_vocabulary", None)
        cell.draft_rows = None if ids is None else cell.ends.draft_rows(ids)
        return cell

    def bound_to(self, base_model: PreTrainedModel) -> "BoundCell":
        """`bound`, but for the rows of the LM head."""
        cell = copy.copy(self)  # the parameters are shared; nothing of the base model is kept in the module
        cell.ends = BaseModelEnds(base_model, self.vocab_size)
        return cell

    def check_base_model(self, base_model: PreTrainedModel) -> None:
        BaseModelEnds(base_model, self.vocab_size).check(self.sketch, self.sketch_rows)
        self.check_draft_vocabulary(base_model)

    def check_draft_vocabulary(self, base_model: PreTrainedModel) -> None:
        """Raises a ValueError where the rows of the LM head that score what is drafted can't be taken."""
        if getattr(self.config, "draft_vocabulary", None) is not None:
            self.config.check_draft_vocabulary()
            BaseModelEnds(base_model, self.vocab_size).draft_rows(self.config.draft_vocabulary)

    def start_from(self, base_model: PreTrainedModel) -> None:
        """Remembers by what its embeddings are recognised."""
        self.sketch_rows.copy_(torch.arange(len(self.sketch_rows)) * self.vocab_size // len(self.sketch_rows))
        sketch = BaseModelEnds(base_model, self.vocab_size).sketch(self.sketch_rows)
        if sketch is not None:
            self.sketch.copy_(sketch)

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


class ReadingCell(BoundCell):
    """A bound cell that reads tokens by the base model's embeddings, and has LM heads of its own.

    Attributes:
        head: LM heads, of which the base model's is the start.
    """

    def lm_head(self, head: int) -> nn.Linear:
        return self.head[head]

    def features(self, state: torch.Tensor) -> torch.Tensor:
        return state[..., : self.head[0].in_features]

    @torch.no_grad()
    def start_from(self, base_model: PreTrainedModel) -> None:
        super().start_from(base_model)
        weight = lm_head_weight(base_model)
        for head in self.head:
            head.weight.zero_()
            head.weight[: len(weight), : self.inner_dim] = weight[: len(head.weight)]

    def resize_vocabulary(self, vocab_size: int, fill) -> None:
        Cell.resize_vocabulary(self, vocab_size, fill)
        self.vocab_size = vocab_size


class BoundSpeculator(MLPSpeculatorPreTrainedModel):
    """A bound cell as a speculator: it drafts for the base model that it was trained beside, and no other."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, BoundCell):
            init.zeros_(module.sketch)
            init.zeros_(module.sketch_rows)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            start = getattr(module, "starts_as", "noise")
            if start == "noise":
                init.normal_(module.weight, std=module.in_features**-0.5)
            else:
                {"zero": init.zeros_, "identity": init.eye_}[start](module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


__all__ = ["BoundCell", "BoundConfig", "BoundSpeculator", "ReadingCell"]
