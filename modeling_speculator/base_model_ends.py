"""What a speculator without a vocabulary of its own uses of the base model of a call: its embeddings and LM head."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .families import changes_logits, family_logits
from .transformers_api import execution_device, mark_static_address


logger = logging.get_logger(__name__)

# How far embeddings may be from those that a speculator was trained beside, relative to their size. Measured on three
# models: 0.002 in bf16, 0.006 to 0.012 in 8 bit, 0.10 to 0.14 in 4 bit, 0.84 and more for those of another model.
_SAME, _ANOTHER = 0.2, 0.7


@dataclass(frozen=True)
class DraftRows:
    """The part of an LM head that scores what can be drafted.

    Attributes:
        key: what it was made of.
        ids, weight, bias: (n,), (n, emb_dim), (n,) or None.
    """

    key: tuple
    ids: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


_draft_rows: WeakKeyDictionary = WeakKeyDictionary()  # by LM head; no more than one of each


class BaseModelEnds:
    """The embeddings and the LM head of a base model, as a speculator of `vocab_size` tokens sees them."""

    SKETCH = (32, 16)  # rows of the embeddings, and numbers that each is projected to

    def __init__(self, base_model: PreTrainedModel, vocab_size: int):
        self.base_model, self.vocab_size = base_model, vocab_size
        self.embeddings = base_model.get_input_embeddings()

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., emb_dim), without a gradient."""
        with torch.no_grad():
            return self.embeddings(input_ids.to(_device_of(self.embeddings))).to(input_ids.device)

    @property
    def lm_head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """From features (..., emb_dim) to logits (..., vocab_size), with a gradient in the features alone."""
        head = self.base_model.get_output_embeddings()
        as_it_is = type(head) is nn.Linear and head.bias is None and head.out_features == self.vocab_size
        return _frozen(head) if as_it_is and not changes_logits(self.base_model) else BaseModelHead(self)

    def draft_rows(self, ids: list[int]) -> DraftRows:
        """The part of the LM head that scores some tokens, in ascending order; but for those that it lacks.

        Its rows are copied once for a base model, and again when its weights were replaced or changed in place (but
        for a change of `weight.data`, which torch does not tell of).

        Raises:
            ValueError: if the LM head has no rows to take.
        """
        head = self.base_model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        is_plain = type(head) is nn.Linear and weight.dtype.is_floating_point and weight.device.type != "meta"
        if not is_plain or isinstance(weight, DTensor) or hasattr(weight, "ds_id"):
            raise ValueError(
                f"`draft_vocabulary` takes rows of the LM head, which that of {type(self.base_model).__name__} "
                f"({type(head).__name__}) does not have as plain weights: it is quantized, adapted or elsewhere. Set "
                "`speculator.config.draft_vocabulary = None`."
            )
        version = None if weight.is_inference() else weight._version
        key = tuple(ids), weight.data_ptr(), version, weight.dtype
        rows = _draft_rows.get(head)
        if rows is None or rows.key != key:
            at = torch.tensor(ids[: bisect.bisect_left(ids, len(weight))], device=weight.device)
            bias = None if head.bias is None else head.bias.detach()[at]
            rows = _draft_rows[head] = DraftRows(key, at, weight.detach()[at], bias)
            for tensor in (rows.ids, rows.weight, *([] if bias is None else [bias])):
                mark_static_address(tensor)
        return rows

    def draft_logits(self, features: torch.Tensor, rows: DraftRows) -> torch.Tensor:
        """Features (..., emb_dim) to logits (..., n) of the tokens that are drafted."""
        logits = nn.functional.linear(features.to(rows.weight.device, rows.weight.dtype), rows.weight, rows.bias)
        return family_logits(self.base_model, logits).to(features.device)

    def draft_head(self, rows: DraftRows) -> Callable[[torch.Tensor], torch.Tensor]:
        """`draft_logits` as `lm_head` is given: with a gradient in the features alone."""
        if rows.bias is not None or changes_logits(self.base_model):
            return DraftHead(self, rows)
        return _linear(rows.weight)

    @torch.no_grad()
    def sketch(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Some rows (n,) of the embeddings, each projected to a few numbers; None where they can't be read.

        Those that the base model lacks, which are the last ones, are left out.
        """
        weight = getattr(self.embeddings, "weight", None)
        unreadable = weight is None or weight.device.type == "meta" or not weight.dtype.is_floating_point
        if unreadable or isinstance(weight, DTensor) or hasattr(weight, "ds_id"):
            return None
        columns = torch.arange(weight.shape[1], dtype=torch.float64)[:, None]
        waves = torch.cos(columns * torch.arange(1, self.SKETCH[1] + 1, dtype=torch.float64))  # no random numbers
        there = rows[rows < len(weight)].to(weight.device)
        return (weight[there].double().cpu() @ waves / len(columns) ** 0.5).float()

    def check(self, expected: torch.Tensor, rows: torch.Tensor) -> None:
        """Raises a ValueError where the embeddings are those of another model than `expected` was the sketch of."""
        was_read = expected.device.type != "meta" and bool(expected.any())
        found = self.sketch(rows) if was_read else None
        if found is None:
            when = "can't be read here" if was_read else "could not be read when the speculator was made"
            logger.warning_once(
                f"The base model's embeddings {when}: only its sizes tell whether the speculator was trained for it."
            )
            return
        expected = expected.cpu().float()[: len(found)]
        distance = float((found - expected).norm() / expected.norm())
        if distance > _ANOTHER:
            raise ValueError(
                f"The speculator was trained beside a base model with other embeddings (they differ by "
                f"{distance:.0%}). It has none of its own: take the speculator of this base model."
            )
        if distance > _SAME:
            logger.warning_once(
                f"The base model's embeddings differ by {distance:.0%} from those that the speculator was trained "
                "beside. The output is right all the same, but fewer drafts will be accepted."
            )


def lm_head_weight(base_model: PreTrainedModel) -> torch.Tensor:
    """What heads start from that begin as the base model's LM head, but for a bias or a soft cap: (vocab, emb_dim).

    Raises:
        ValueError: where it does not lie here whole.
    """
    weight = base_model.get_output_embeddings().weight
    if hasattr(weight, "ds_id") or isinstance(weight, DTensor):
        raise ValueError("These heads start from whole weights of the base model, not from those of ZeRO-3 or FSDP.")
    config = base_model.config.get_text_config(decoder=True)
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)  # Cohere, Granite
    return scale * weight


class BaseModelHead:
    """An LM head with what its family does to logits, for as many tokens as a speculator has."""

    def __init__(self, ends: BaseModelEnds):
        self.base_model, self.out_features = ends.base_model, ends.vocab_size

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        head = self.base_model.get_output_embeddings()
        logits = _frozen(head)(features.to(_device_of(head), self.base_model.dtype))
        return family_logits(self.base_model, logits, self.out_features).to(features.device)


class DraftHead:
    """The part of an LM head that scores what can be drafted, with what its family does to logits."""

    def __init__(self, ends: BaseModelEnds, rows: DraftRows):
        self.ends, self.rows, self.out_features = ends, rows, len(rows.ids)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return self.ends.draft_logits(features, self.rows)


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A product with a weight that is there and gets no gradient."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def _frozen(head: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """An LM head as it is, but that its weights get no gradient: the base model is not ours to train."""
    if not torch.is_grad_enabled() or not any(weight.requires_grad for weight in head.parameters()):
        return head
    if type(head) is nn.Linear and head.bias is None:
        return _linear(head.weight)
    weights = {name: weight.detach() for name, weight in head.named_parameters()}
    return lambda features: torch.func.functional_call(head, weights, (features,))


def _device_of(module: nn.Module) -> torch.device:
    """Where a module takes its input."""
    device = next(module.parameters()).device
    elsewhere = execution_device(module) if device.type == "meta" else None
    return device if elsewhere is None else torch.device(elsewhere)


__all__ = ["BaseModelEnds"]
