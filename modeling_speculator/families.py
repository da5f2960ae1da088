"""The base models whose output is known to be reproduced, and what their decoders expect of attention masks."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel


# A family is added with its equality test, which decides where it belongs: a single causal mask for all layers of
# Mistral, say, would silently drop its window.
ONE_MASK = (  # every layer attends to all tokens before
    "cohere",
    "gemma",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "granite",
    "granitemoe",
    "llama",
    "olmo2",
    "phi",
    "stablelm",
)
ONE_WINDOWED_MASK = ("mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2")  # every layer, if there is a window
MASK_PER_LAYER_TYPE = ("cohere2", "gemma2", "gemma3_text", "gpt_oss", "qwen2", "qwen2_moe", "qwen3", "smollm3")

# Models around one of these whose text is decoded as the text model alone decodes it. (PaliGemma's is not: its
# positions start at 1.)
MULTIMODAL = ("gemma3", "llava")

SUPPORTED_MODEL_TYPES = ONE_MASK + ONE_WINDOWED_MASK + MASK_PER_LAYER_TYPE

# Those with a table of positions, which ends.
LEARNED_POSITIONS = ("gpt_bigcode", "gpt2")

# Those that add an embedding for the type of each token, be it 0. To others a type is what marks an image.
EMBEDDED_TOKEN_TYPES = ("gpt_bigcode", "gpt2")


def attention_windows(config: PreTrainedConfig) -> dict[str | None, int | None]:
    """The masks that a decoder expects: {type of layer: how many tokens back it attends to, None for all}.

    A single key None stands for one mask for all layers.

    Raises:
        ValueError: for a type of layer that has another pattern of attention.
    """
    if config.model_type in MASK_PER_LAYER_TYPE:
        windows = {"full_attention": None, "sliding_attention": config.sliding_window}
        unknown = set(config.layer_types) - windows.keys()
        if unknown:
            raise ValueError(
                f"Layers of type {', '.join(sorted(unknown))} take no mask of a candidate tree. "
                "Generate without `assistant_model`."
            )
        return {kind: windows[kind] for kind in sorted(set(config.layer_types))}
    return {None: config.sliding_window if config.model_type in ONE_WINDOWED_MASK else None}


def mask_kinds(config: PreTrainedConfig) -> tuple[str | None, ...]:
    """Of each layer of a decoder, which of the masks of `attention_windows` it takes."""
    if config.model_type in MASK_PER_LAYER_TYPE:
        return tuple(config.layer_types)
    return (None,) * config.num_hidden_layers


def final_norm(base_model: PreTrainedModel) -> nn.Module:
    """The norm after the last layer of a base model's decoder, of which context vectors come out."""
    decoder = base_model.get_decoder()
    for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
        if hasattr(decoder, name):
            return getattr(decoder, name)
    raise ValueError(f"The final norm of {type(base_model).__name__} was not found, which streams go through.")


def decoder_layers(base_model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a base model's decoder."""
    n_layers = base_model.config.get_text_config(decoder=True).num_hidden_layers
    lists = (part for part in base_model.get_decoder().modules() if isinstance(part, nn.ModuleList))
    found = next((part for part in lists if len(part) == n_layers), None)
    if found is None:
        raise ValueError(f"The layers of {type(base_model).__name__} were not found, whose input is to be read.")
    return found


def check_feature_layers(base_model: PreTrainedModel, feature_layers: Sequence[int]) -> None:
    """Raises a ValueError where a drafter wants to know the input of a layer that a base model does not have."""
    n_layers = base_model.config.get_text_config(decoder=True).num_hidden_layers
    if any(not 0 <= at < n_layers for at in feature_layers):
        raise ValueError(
            f"`feature_layers={list(feature_layers)}` names a layer that {type(base_model).__name__} does not have: "
            f"it has {n_layers}, counted from 0."
        )


def changes_logits(base_model: PreTrainedModel) -> bool:
    """Whether a family does something to what its LM head returns, which `output_logits` then does, too."""
    config = base_model.config.get_text_config(decoder=True)
    names = ("logits_scaling", "logit_scale", "final_logit_softcapping")
    return any(getattr(config, name, None) is not None for name in names)


def output_logits(
    base_model: PreTrainedModel, hidden_states: torch.Tensor, vocab_size: int | None = None
) -> torch.Tensor:
    """The logits that a base model makes of context vectors: (..., emb_dim) -> (..., vocab).

    Its LM head, then what some families do to the result; a forward of the model does the same from its tokens.

    Args:
        vocab_size: of a speculator, for logits of its tokens: of those that the base model has beyond there are none,
            those that it lacks are impossible. By default the base model's.
    """
    return family_logits(base_model, base_model.get_output_embeddings()(hidden_states), vocab_size)


def family_logits(base_model: PreTrainedModel, logits: torch.Tensor, vocab_size: int | None = None) -> torch.Tensor:
    """`output_logits`, from what the LM head has returned."""
    config = base_model.config.get_text_config(decoder=True)
    if hasattr(config, "logits_scaling"):  # Granite
        logits = logits / config.logits_scaling
    if hasattr(config, "logit_scale"):  # Cohere
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    missing = 0 if vocab_size is None else vocab_size - logits.shape[-1]
    return logits[..., :vocab_size] if missing <= 0 else F.pad(logits, (0, missing), value=-torch.inf)
