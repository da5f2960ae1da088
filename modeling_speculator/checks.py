"""What can't be honoured is refused here, with a ValueError that says what to do, before any forward."""

from collections.abc import Iterable

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


def check_inputs(model, input_ids, generation_config, logits_processor, stopping_criteria, model_kwargs) -> None:
    """Raises a ValueError for what only shows once `generate` has prepared its inputs; nothing has run by then."""
    cache = model_kwargs.get("past_key_values")
    unknown = sorted(key for key in model_kwargs.keys() - _KNOWN_MODEL_KWARGS if model_kwargs[key] is not None)
    known_criteria = (MaxLengthCriteria, EosTokenCriteria)
    criteria = [type(c).__name__ for c in stopping_criteria if not isinstance(c, known_criteria)]
    _refuse(
        [f"the model input `{key}`" for key in unknown]
        + [f"the logits processor {type(processor).__name__}" for processor in logits_processor]
        + [f"the stopping criterion {name}" for name in criteria]
        + (["`past_key_values` of an earlier call"] if getattr(cache, "_is_user_defined", False) else [])
    )
    config = model.config.get_text_config(decoder=True)
    if config.model_type in _LEARNED_POSITIONS and generation_config.max_length > config.max_position_embeddings:
        raise ValueError(
            f"{generation_config.max_length} tokens in all (prompt and `max_new_tokens`) are more than the "
            f"{config.max_position_embeddings} positions that the base model learned. Shorten the prompt, or lower "
            "`max_new_tokens`."
        )


def _refuse(options: Iterable[str]) -> None:
    options = list(options)
    if options:
        raise ValueError(f"Speculation does not support {', '.join(options)}. Drop that, or drop `assistant_model`.")
