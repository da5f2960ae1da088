"""What can't be honoured is refused here, with a ValueError that says what to do, before any forward."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import Cache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer
from transformers.generation import GenerationMode
from transformers.utils import logging

from .attention import uses_sdpa
from .candidates import CandidateSelection
from .configuration_mlp_speculator import DIALS, MLPSpeculatorConfig
from .families import FAMILIES, attention_windows, check_family, check_feature_layers, family_of
from .lookup import check_n_lookup_tokens
from .tokenwise import check_tokenwise
from .transformers_api import CACHE, attn_implementation, execution_device, is_checkpointing
from .vocabularies import MOST_DIFFERENT_IDS


logger = logging.get_logger(__name__)

# What may reach the forward of the base model besides the tokens.
_KNOWN_MODEL_KWARGS = {
    "attention_mask",
    "inputs_embeds",
    "logits_to_keep",
    "output_hidden_states",
    "position_ids",
    "use_cache",
}
# What marks the tokens of an image, or adds an embedding; a tokenizer or processor returns them for mere text, too.
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


def check_models(model, speculator) -> None:
    """Raises a ValueError where the loop can't serve a base model, or a speculator doesn't fit it."""
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder; speculators draft for decoder-only models. Drop `assistant_model`."
        )
    check_family(model)
    for rope_type in {"dynamic", "longrope"} & rope_types(config):
        raise ValueError(
            f"{name} has `rope_type={rope_type!r}`, whose angles depend on the longest position in a forward, drafted "
            "ones included: the output would differ. Generate without `assistant_model`."
        )
    attention_windows(config)
    check_shapes(model, speculator)
    if speculator.config.n_candidates > 0:
        check_tokenwise(model)
    warn_of_another_base(model, speculator)
    if isinstance(speculator.config, MLPSpeculatorConfig):
        dials = (getattr(speculator.config, dial) for dial in DIALS)
        speculator.config.check_dials(*dials, vocab_size=min(config.vocab_size, speculator.config.vocab_size))
    else:
        check_n_lookup_tokens(getattr(speculator.config, "n_lookup_tokens", None) or 0)
    check_feature_layers(model, getattr(speculator.config, "feature_layers", None) or ())
    if isinstance(speculator, CandidateSelection):
        speculator.speculator.check_base_model(model)
        speculator.speculator.check_generation(model)
    if not uses_sdpa(model) and attn_implementation(config) != "eager":
        raise ValueError(
            f"{name} runs with `attn_implementation={attn_implementation(config)!r}`, which takes no mask of a "
            'candidate tree. Load it with `attn_implementation="sdpa"` or "eager".'
        )
    if model.training and is_checkpointing(model):
        raise ValueError(
            f"{name} is training with gradient checkpointing, which allows no cache. Call `eval()` first."
        )
    # peft lends the base model its own method for the time of a call.
    adapted = getattr(model.prepare_inputs_for_generation, "__self__", model)
    if getattr(getattr(adapted, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"{name} has an adapter of virtual tokens, which are in its cache but not in the text; speculation does "
            "not support that. Use an adapter of the weights, such as LoRA."
        )
    home = main_device(model)
    device = getattr(speculator, "device", home)  # a drafter without weights has none
    if device != home:
        raise ValueError(
            f"The speculator is on {device} and {name} on {home}. Move it with `speculator.to({str(home)!r})`."
        )


def warn_of_another_base(model, speculator) -> None:
    """Says once where a speculator was trained for a base model of another name: it would draft badly."""
    trained_for = getattr(speculator.config, "base_model_name_or_path", None)
    names = [_hub_name(name) for name in (trained_for, model.config.name_or_path) if name]
    if (
        len(names) == 2
        and names[0] != names[1]
        and (all("/" in name for name in names) or names[0].split("/")[-1] != names[1].split("/")[-1])
    ):
        logger.warning_once(
            f"The speculator was trained for {trained_for}, but drafts for {model.config.name_or_path}. The output is "
            "right all the same, but fewer drafts will be accepted."
        )


def _hub_name(name: str) -> str:
    """Of a Hub id, also where it lies in the Hub's cache, the id; of another folder its last name."""
    in_cache = re.search(r"models--([^/]+)/snapshots/", name)
    if in_cache:
        return in_cache[1].replace("--", "/", 1).lower()
    is_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
    return name.lower() if is_id else Path(name).name.lower()


def rope_types(config) -> set[str]:
    """The kinds of rotary positions of a model, which may differ between types of layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {part.get("rope_type", "default") for part in [parameters, *nested]}


def main_device(model) -> torch.device:
    """Where a base model takes its inputs, and a speculator has to be."""
    if model.device.type != "meta":
        return model.device
    # Its weights are offloaded: accelerate's hooks bring them to where they are needed.
    devices = map(execution_device, model.modules())
    return torch.device(next(device for device in devices if device is not None))


def check_shapes(model, speculator) -> None:
    """Raises a ValueError where a speculator has another tokenizer or another hidden size than the base model."""
    config = model.config.get_text_config(decoder=True)
    for ours, theirs, tolerance in (("vocab_size", "vocab_size", MOST_DIFFERENT_IDS), ("emb_dim", "hidden_size", 0)):
        expected, given = getattr(config, theirs), getattr(speculator.config, ours)
        if given is not None and abs(expected - given) > tolerance:  # None: it fits any base model
            trained_for = getattr(speculator.config, "base_model_name_or_path", None) or "another base model"
            raise ValueError(
                f"The speculator has `{ours}={given}`, but {type(model).__name__} has `{theirs}={expected}`: "
                f"it was made for {trained_for}. Take the speculator of this base model."
            )


def check_options(generation_mode, generation_config: GenerationConfig) -> None:
    """Raises a ValueError that names a generation option which speculation can't honour."""
    if generation_mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"A speculator can't be combined with {generation_mode.value.replace('_', ' ')}. Set `num_beams=1` and no "
            "other decoding strategy, or drop `assistant_model`."
        )
    speculation = getattr(generation_config, "speculation", None)
    if speculation not in (None, "adaptive"):
        raise ValueError(f"`speculation` of the generation config must be None or 'adaptive', but is {speculation!r}.")
    implementation = generation_config.cache_implementation
    not_supported = {
        f"cache_implementation={implementation!r}": implementation not in (None, "dynamic", "static"),
        # Keys lie in the order in which they were drafted, rejected ones among them.
        "output_attentions=True": generation_config.output_attentions,
        "token_healing=True": generation_config.token_healing,
        "dola_layers": generation_config.dola_layers is not None,
        # Drafters of their own: `generate` would take one and drop the other.
        "prompt_lookup_num_tokens": generation_config.prompt_lookup_num_tokens is not None,
        "assistant_early_exit": generation_config.assistant_early_exit is not None,
    }
    _refuse(name for name, given in not_supported.items() if given)


def check_request(model, request) -> None:
    """Raises a ValueError for what only shows once `generate` has prepared its inputs; nothing has run by then."""
    model_kwargs = request.model_kwargs
    config = model.config.get_text_config(decoder=True)
    adds_types = {"token_type_ids"} if family_of(config).embeds_token_types else set()
    _refuse(
        f"the model input `{key}`" + (" with values other than 0, as images have" if key in _TOKEN_TYPES else "")
        for key in sorted(model_kwargs.keys() - _KNOWN_MODEL_KWARGS - adds_types)
        if not _is_empty(model_kwargs[key]) and not (key in _TOKEN_TYPES and not model_kwargs[key].any())
    )
    if request.is_adaptive and (model.tp_size or 1) > 1:
        raise ValueError(
            '`speculation="adaptive"` goes by a clock, but with tensor parallelism all processes must do the same. '
            "Set `speculator.config.n_candidates` yourself."
        )
    batch, given = request.input_ids.shape
    embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    cache = request.past
    if cache is not None:
        _refuse([f"`use_cache=False` beside a `{CACHE}`"] if not request.generation_config.use_cache else [])
        check_cache(cache, request)
    cached = 0 if cache is None else int(cache.get_seq_length())
    given = given if embeds is None else embeds.shape[1]
    rows = batch if mask is None else mask.shape[0]
    if rows != batch or request.context_length not in {given, cached + given}:
        raise ValueError(
            f"`attention_mask` has shape {(rows, request.context_length)}, but the inputs have {(batch, given)}"
            + (f" and the cache {cached} tokens more" if cached else "")
            + ". Give it an entry for every token, those in the cache included."
        )
    if request.context_length == 0:
        raise ValueError("The prompt is empty. Pass at least one token, such as the beginning-of-sequence token.")
    if request.context_length <= cached:
        raise ValueError(
            f"`{CACHE}` holds {cached} tokens already, all of the {request.context_length} that were given. "
            f"Pass at least one new token, or `{CACHE}.crop(-1)` first."
        )
    position_ids = model_kwargs.get("position_ids")
    if position_ids is not None and position_ids.ndim != 2:
        raise ValueError(f"`position_ids` must have the shape (batch, length), but have {tuple(position_ids.shape)}.")
    check_positions(model, int(request.last_positions.max()) + request.budget)  # the last token is never run


def check_cache(cache: Cache, request) -> None:
    """Raises a ValueError for a cache of an earlier call that can't be read, or is too small to be handed back."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
    if getattr(cache, "offloading", False) or any(type(layer) not in kinds for layer in cache.layers):
        raise ValueError(
            f"Speculation reads no {type(cache).__name__} whose layers are offloaded, quantized or other than keys "
            f"and values. Pass a `DynamicCache` or a `StaticCache` as `{CACHE}`."
        )
    batch, mask = len(request.input_ids), request.model_kwargs.get("attention_mask")
    if batch > 1 and mask is not None and not mask.all():
        raise ValueError(f"`{CACHE}` can be passed for a batch only if no row is padded. Pass the rows one by one.")
    if batch > 1 and request.synced_gpus:
        raise ValueError(
            f"`{CACHE}` of a batch can't be handed back under `synced_gpus`: rows that end apart need a "
            "forward of this process alone. Pass the rows one by one."
        )
    rows = {layer.keys.shape[0] for layer in cache.layers if layer.is_initialized}
    if rows - {batch}:
        raise ValueError(f"`{CACHE}` is of a batch of {max(rows)}, but the inputs are of one of {batch}.")
    room = min((layer.get_max_length() for layer in cache.layers if type(layer) is StaticLayer), default=None)
    needed = request.context_length + request.budget - 1
    if room is not None and needed > room:
        raise ValueError(
            f"`{CACHE}` is a static cache of {room} tokens, but the request needs {needed}. "
            "Make it larger, or lower `max_new_tokens`."
        )


def check_positions(model, n_tokens: int) -> None:
    """Raises a ValueError where a model with a table of positions is to read more tokens than it holds."""
    config = model.config.get_text_config(decoder=True)
    family = FAMILIES.get(config.model_type)
    if family is not None and family.has_position_table and n_tokens > config.max_position_embeddings:
        raise ValueError(
            f"{n_tokens} tokens are more than the {config.max_position_embeddings} positions that the base model "
            "learned. Shorten the text, or lower `max_new_tokens` (training: `sequence_length`, `generation_length`)."
        )


def _is_empty(value) -> bool:
    """Whether a model input says nothing; multimodal models get a dict of encoder outputs with text, too."""
    return value is None or (isinstance(value, dict) and all(part is None for part in value.values()))


def _refuse(options: Iterable[str]) -> None:
    options = list(options)
    if options:
        raise ValueError(f"Speculation does not support {', '.join(options)}. Drop that, or drop `assistant_model`.")
