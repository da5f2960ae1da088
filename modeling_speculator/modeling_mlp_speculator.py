"""The speculator as a model: heads over a context vector and the tokens drawn after it, for training and for drafting.

Architecture and initialisation: arXiv 2404.19124 and its published implementation (foundation-model-stack/fms-extras).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .candidates import CandidateSelection
from .cells import CELLS, MLPSpeculatorRMSNorm
from .configuration_mlp_speculator import DIALS, MLPSpeculatorConfig
from .formats import REPEATED_KEYS
from .persistence import WholeCheckpoints


@dataclass
class MLPSpeculatorOutput(ModelOutput):
    """
    loss: scalar, the sum of `losses`; None without labels.
    logits: (n_predict, batch, n, vocab).
    losses: (n_predict,), the mean cross-entropy of each head; None without labels.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    losses: torch.Tensor | None = None


class MLPSpeculatorPreTrainedModel(CandidateSelection, WholeCheckpoints, PreTrainedModel):
    """An MLP speculator: load it with `from_pretrained`, draft with `model.generate(assistant_model=speculator)`."""

    config_class = MLPSpeculatorConfig
    base_model_prefix = "speculator"
    main_input_name = "hidden_states"
    _keys_to_ignore_on_load_unexpected = REPEATED_KEYS
    cells = CELLS  # by the config's `method`

    def __init__(self, config: MLPSpeculatorConfig):
        super().__init__(config)
        self.speculator = self.cells[config.method](config)
        tied = self.speculator.tied_weights(config.n_predict)  # honoured where config.tie_weights is set
        self._tied_weights_keys = {f"speculator.{key}": f"speculator.{source}" for key, source in tied.items()}
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=(self.config.inner_dim or self.config.emb_dim) ** -0.5)
        elif isinstance(module, MLPSpeculatorRMSNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Embedding | None:
        return next((module for module in self.speculator.modules() if isinstance(module, nn.Embedding)), None)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding | None:
        """`PreTrainedModel.resize_token_embeddings`, for the embeddings and LM heads of all heads.

        Needed only to train the speculator on tokens that were added: it drafts for a base model with some more or
        less as it is.

        Args:
            new_num_tokens: as the base model has; None leaves the number.
            pad_to_multiple_of: rounds it up.
            mean_resizing: whether new tokens start as the mean of the others, or as in a new speculator.

        Raises:
            ValueError: if fewer tokens are left than a head drafts.
        """
        vocab_size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            vocab_size = -(-vocab_size // pad_to_multiple_of) * pad_to_multiple_of
        self.config.check_dials(*(getattr(self.config, dial) for dial in DIALS), vocab_size=vocab_size)

        def fill(new: torch.Tensor, old: torch.Tensor) -> None:
            if mean_resizing:
                new.copy_(old.float().mean(0))
            else:
                new.normal_(std=self.speculator.inner_dim**-0.5)

        if vocab_size != self.config.vocab_size:
            self.speculator.resize_vocabulary(vocab_size, fill)
            self.config.vocab_size = vocab_size
        return self.get_input_embeddings()

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        objective: Callable | None = None,
        base_model: PreTrainedModel | None = None,
        features: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
    ) -> MLPSpeculatorOutput:
        """All heads at all positions at once, each head fed the true tokens: the training forward.

        Args:
            hidden_states: (batch, n, emb_dim), context vectors of the base model. With a context layer there may be
                more, (batch, m + n, emb_dim), than labels speak of: the first m are then read by that layer only.
            input_ids: (batch, >= n + n_predict - 1), `input_ids[:, i]` the token drawn from `hidden_states[:, i]`.
            labels: (batch, n + n_predict - 1), `labels[:, i + j]` what head `i` shall predict at position `j`;
                -100 is ignored.
            objective: what a trainer computes in place of the logits of all heads, which may not fit into memory:
                called with this model's `speculator` and the three tensors, its result is returned.
            base_model: needed by heads that use its embeddings and LM head.
            features, segments: of a text, for a context layer; see `Cell.with_context`.

        Raises:
            ValueError: if the lengths don't fit together, or a base model is needed.
        """
        drafter = self if base_model is None else self.beside(base_model)
        cell = drafter.speculator
        n_predict, n = self.config.n_predict, hidden_states.shape[1]
        needed = n + n_predict - 1
        n_context = needed - labels.shape[1] if labels is not None and cell.reads_text else 0
        labels_fit = labels is None or labels.shape[1] == needed - n_context
        if input_ids.shape[1] < needed or not 0 <= n_context < n or not labels_fit:
            raise ValueError(
                f"{n} context vectors and {n_predict} heads need `input_ids` of at least, and `labels` of exactly, "
                f"n + n_predict - 1 = {needed} tokens; got {input_ids.shape[1]}"
                + (f" and {labels.shape[1]}." if labels is not None else ".")
            )
        hidden_states = cell.with_context(hidden_states, input_ids[:, :n], features, segments)[:, n_context:]
        input_ids, n = input_ids[:, n_context:], n - n_context
        if objective is not None:
            return objective(cell, hidden_states, input_ids, labels)
        output = MLPSpeculatorOutput(logits=drafter.score(hidden_states, input_ids))
        if labels is not None:
            output.losses = torch.stack(
                [mean_cross_entropy(logits, labels[:, i : i + n]) for i, logits in enumerate(output.logits)]
            )
            output.loss = output.losses.sum()
        return output


def mean_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the labels that are not -100 (0 where none is): (..., vocab), (...) -> scalar, in float32."""
    loss = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="sum", ignore_index=-100)
    return loss / (labels != -100).sum().clamp(min=1)


__all__ = ["MLPSpeculatorPreTrainedModel"]
