"""What can't be honoured is refused here, with a ValueError that says what to do, before any forward."""

from collections.abc import Iterable

import torch
from transformers import GenerationConfig
from transformers.generation import EosTokenCriteria, GenerationMode, MaxLengthCriteria

from .attention import uses_sdpa
from .configuration_mlp_speculator import MLPSpeculatorConfig


# Base models whose output was shown to be reproduced exactly: a family is added with its test.
SUPPORTED_MODEL_TYPES = ("llama", "granite", "gpt_bigcode", "gpt2")
# Those among them with a table of positions, which ends.
_LEARNED_POSITIONS = ("gpt_bigcode", "gpt2")
# What may reach the forward of the base model besides the tokens.
_KNOWN_MODEL_KWARGS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


def check_models(model, speculator) -> None:
    """Raises a ValueError where the loop can't serve a base model, or a speculator doesn't fit it."""
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder; speculators draft for decoder-only models. Drop `assistant_model`."
        )
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"Speculation is not supported for {name} (model type {config.model_type!r}), only for "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}. Generate without `assistant_model`."
        )
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"{name} has `rope_type={rope_type!r}`, whose angles depend on the longest position in a forward, drafted "
            "ones included: the output would differ. Generate without `assistant_model`."
        )
    check_shapes(model, speculator)
    if isinstance(speculator.config, MLPSpeculatorConfig):
        speculator.config.check_dials(speculator.config.top_k_tokens_per_head, speculator.config.n_candidates)
    if not uses_sdpa(model) and config._attn_implementation != "eager":
        raise ValueError(
            f"{name} runs with `attn_implementation={config._attn_implementation!r}`, which takes no mask of a "
            'candidate tree. Load it with `attn_implementation="sdpa"` or "eager".'
        )
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(
            f"{name} is spread over several devices, which speculation does not support. Load it on one device."
        )
    if model.training and model.is_activation_checkpointing:
        raise ValueError(
            f"{name} is training with gradient checkpointing, which allows no cache. Call `eval()` first."
        )
    device = getattr(speculator, "device", model.device)  # a drafter without weights has none
    if device != model.device:
        raise ValueError(
            f"The speculator is on {device} and {name} on {model.device}. "
            f"Move it with `speculator.to({str(model.device)!r})`."
        )


def check_shapes(model, speculator) -> None:
    """Raises a ValueError where a speculator has another vocabulary or another hidden size than the base model."""
    config = model.config.get_text_config(decoder=True)
    for ours, theirs in (("vocab_size", "vocab_size"), ("emb_dim", "hidden_size")):
        expected, given = getattr(config, theirs), getattr(speculator.config, ours)
        if expected != given:
            trained_for = getattr(speculator.config, "base_model_name_or_path", None) or "another base model"
            raise ValueError(
                f"The speculator has `{ours}={given}`, but {type(model).__name__} has `{theirs}={expected}`: "
                f"it was made for {trained_for}. Take the speculator of this base model."
            )


def check_options(generation_mode, generation_config: GenerationConfig, mode_kwargs: dict) -> None:
    """Raises a ValueError that names a generation option which speculation can't honour."""
    if generation_mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"A speculator can't be combined with {generation_mode.value.replace('_', ' ')}. Set `num_beams=1` and no "
            "other decoding strategy, or drop `assistant_model`."
        )
    not_supported = {
        "do_sample=True": generation_config.do_sample,
        "use_cache=False": not generation_config.use_cache,
        "num_return_sequences > 1": generation_config.num_return_sequences > 1,
        f"cache_implementation={generation_config.cache_implementation!r}": (
            generation_config.cache_implementation not in (None, "dynamic")
        ),
        "output_scores=True": generation_config.output_scores,
        "output_logits=True": generation_config.output_logits,
        "output_attentions=True": generation_config.output_attentions,
        "output_hidden_states=True": generation_config.output_hidden_states,
        "token_healing=True": generation_config.token_healing,
        "synced_gpus=True": mode_kwargs.get("synced_gpus"),
        "a streamer": mode_kwargs.get("streamer") is not None,
    }
    _refuse(name for name, given in not_supported.items() if given)


def check_inputs(model, generation_config, logits_processor, stopping_criteria, model_kwargs) -> None:
    """Raises a ValueError for what only shows once `generate` has prepared its inputs; nothing has run by then."""
    cache = model_kwargs.get("past_key_values")
    unknown = sorted(key for key in model_kwargs.keys() - _KNOWN_MODEL_KWARGS if model_kwargs[key] is not None)
    foreign = [c for c in stopping_criteria if not _is_our_criterion(c, generation_config)]
    mask, position_ids = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    _refuse(
        [f"the model input `{key}`" for key in unknown]
        + [f"the logits processor {type(processor).__name__}" for processor in logits_processor]
        + [f"the stopping criterion {type(criterion).__name__}" for criterion in foreign]
        + (["`past_key_values` of an earlier call"] if getattr(cache, "_is_user_defined", False) else [])
        + (["`position_ids` other than the attention mask's"] if not _counts_the_mask(position_ids, mask) else [])
    )
    padding = 0 if mask is None else int((mask == 0).sum(-1).min())
    check_positions(model, generation_config.max_length - padding - 1)  # the last token is never run


def check_positions(model, n_tokens: int) -> None:
    """Raises a ValueError where a model with a table of positions is to read more tokens than it holds."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type in _LEARNED_POSITIONS and n_tokens > config.max_position_embeddings:
        raise ValueError(
            f"{n_tokens} tokens are more than the {config.max_position_embeddings} positions that the base model "
            "learned. Shorten the text, or lower `max_new_tokens` (training: `sequence_length`, `generation_length`)."
        )


def _is_our_criterion(criterion, generation_config: GenerationConfig) -> bool:
    """Whether it says no more than the lengths and end tokens of the generation config, which the loop honours."""
    if type(criterion) is MaxLengthCriteria:
        return criterion.max_length == generation_config.max_length
    if type(criterion) is EosTokenCriteria:
        ours = generation_config._eos_token_tensor
        return ours is not None and set(criterion.eos_token_id.tolist()) == set(ours.tolist())
    return False


def _counts_the_mask(position_ids: torch.Tensor | None, mask: torch.Tensor | None) -> bool:
    """Whether positions are those that `generate` makes itself: 0, 1, 2, ... over the tokens that are no padding."""
    if position_ids is None:
        return True
    if mask is None:
        return torch.equal(position_ids, torch.arange(position_ids.shape[-1]).to(position_ids).expand_as(position_ids))
    counted = mask.long().cumsum(-1) - 1
    return bool(((position_ids == counted) | (mask == 0)).all())


def _refuse(options: Iterable[str]) -> None:
    options = list(options)
    if options:
        raise ValueError(f"Speculation does not support {', '.join(options)}. Drop that, or drop `assistant_model`.")
