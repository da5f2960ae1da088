"""What is read from the frozen base model: context vectors, and logits where a loss is on its distribution."""

import inspect
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..checks import check_positions
from ..context_vectors import Reading, recorded_states
from ..families import output_logits, shares_keys


@torch.no_grad()
def read(
    base_model: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    feature_layers: Sequence[int] = (),
) -> Reading:
    """Context vectors of a text (batch, length) in the base model's own dtype, and what enters some layers.

    Args:
        position_ids: (batch, length); where they start again, so does a document, and attends to nothing before.
        attention_mask: (batch, length), 0 at padding before a text.
    """
    check_positions(base_model, input_ids.shape[1])
    if attention_mask is not None:
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    options = {"position_ids": position_ids, "attention_mask": attention_mask}
    options = {name: value for name, value in options.items() if value is not None}
    if "logits_to_keep" in inspect.signature(base_model.forward).parameters and not shares_keys(base_model):
        options["logits_to_keep"] = 1  # of the logits, which nobody asked for
    # The whole model is called, not its decoder: what gathers sharded weights hangs on it.
    with recorded_states(base_model, feature_layers) as states, torch.autocast(input_ids.device.type, enabled=False):
        base_model(input_ids=input_ids, use_cache=False, **options)
    return Reading.of(states, feature_layers)


@torch.no_grad()
def check_separation(base_model: PreTrainedModel, device: torch.device) -> None:
    """Raises a ValueError where a base model does not keep apart the documents that share a sequence."""
    vocab_size = base_model.config.get_text_config(decoder=True).vocab_size
    pairs = torch.arange(16, device=device).view(2, 8) % vocab_size  # two rows: some attention looks at one only
    alone = read(base_model, pairs[:, 4:]).hidden_states
    packed = read(base_model, pairs, torch.arange(4, device=device).repeat(2, 2)).hidden_states
    if not _close(packed[:, 4:], alone):
        raise ValueError(
            f"{type(base_model).__name__} lets a document attend to the one before it in a sequence, whatever its "
            "`position_ids` say. Set `separate_documents: false`."
        )


@torch.no_grad()
def check_output_logits(base_model: PreTrainedModel, device: torch.device) -> None:
    """Raises a ValueError where `output_logits` is not what a base model's forward makes of its context vectors."""
    tokens = torch.arange(4, device=device)[None]
    with recorded_states(base_model) as states:
        expected = base_model(input_ids=tokens, use_cache=False).logits
    if not _close(output_logits(base_model, states[None][0]), expected):
        raise ValueError(
            f"The logits of {type(base_model).__name__} are not known as a function of its context vectors, which "
            'losses on its distribution need. Train with `loss: ["cross_entropy"]`.'
        )


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal up to the rounding of half precision; what these checks look for is of another size."""
    return bool((one.float() - other.float()).norm() <= 0.05 * other.float().norm())
