"""The speculator that a recipe asks for: a new one, one that goes on learning, or an adapter for one."""

import logging

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from ..checks import check_shapes
from ..configuration_mlp_speculator import MLPSpeculatorConfig
from ..drafters import DRAFTERS, config_class_of
from ..loading import speculator_config
from ..modeling_mlp_speculator import MLPSpeculatorPreTrainedModel
from ..modeling_streaming import StreamingCell
from .provenance import revision_of
from .training_args import ModelArguments


logger = logging.getLogger(__name__)

_OF_A_NEW_ONE = (
    "n_predict",
    "inner_dim",
    "top_k_tokens_per_head",
    "n_candidates",
    "method",
    "feature_layers",
    "context_heads",
    "context_kv_heads",
    "context_inner_dim",
    "n_blocks",
    "prefix_layer",
    "n_stream_layers",
    "stream_lora_rank",
    "shared_adapter",
    "exit_rank",
    "tie_weights",
    "scale_input",
)


def load_or_create_speculator(
    args: ModelArguments, base_model: PreTrainedModel
) -> MLPSpeculatorPreTrainedModel | PeftModel:
    """The speculator to train, in float32: the optimizer's updates are lost in half precision.

    Raises:
        ValueError: where a recipe describes a new speculator and names one to start from, or neither will do.
    """
    check_new_or_given(args)
    if args.speculator is not None:
        speculator = _to_go_on_with(args, base_model)
    elif args.lora_rank is not None:
        raise ValueError("`lora_rank` adapts a speculator that is there: set `speculator` to its folder or Hub id.")
    else:
        config = new_config(args, base_model.config)
        speculator = DRAFTERS[type(config)](config)
        speculator.speculator.fit(base_model)
        speculator.speculator.start_from(base_model)
    speculator.config.take_special_tokens(base_model.config)
    if args.tie_to_base_model:
        _tie_to_base_model(speculator, base_model)
    return speculator


def new_config(args: ModelArguments, base_config: PreTrainedConfig) -> MLPSpeculatorConfig:
    """The config of a new speculator for a base model.

    Raises:
        ValueError: for sizes that do not fit together.
    """
    given, config = _given(args), base_config.get_text_config(decoder=True)
    if args.tie_to_base_model:
        width = given.get("inner_dim") or config.hidden_size
        if not given.setdefault("tie_weights", True) or width != config.hidden_size:
            raise ValueError(
                f"`tie_to_base_model` makes the base model's embeddings, {config.hidden_size} wide, those of all "
                "heads: drop `tie_weights` and `inner_dim`."
            )
    method = given.get("method", MLPSpeculatorConfig.method)
    config_class = config_class_of(method)
    unknown = sorted(key for key in given if not hasattr(config_class, key))
    if unknown:
        raise ValueError(f"`method: {method}` has no {', '.join(unknown)}.")
    return config_class(
        vocab_size=config.vocab_size,
        emb_dim=config.hidden_size,
        base_model_name_or_path=args.base_model,
        base_model_revision=revision_of(args.base_model, args.base_model_revision),
        **given,
    )


def check_new_or_given(args: ModelArguments) -> None:
    """Raises a ValueError where a recipe describes a new speculator and names one to start from."""
    if args.speculator is not None and _given(args):
        raise ValueError(
            f"{sorted(_given(args))} describe a new speculator, but `speculator: {args.speculator}` starts from one "
            "that has its own. Drop them, or drop `speculator`."
        )


def _given(args: ModelArguments) -> dict:
    return {key: getattr(args, key) for key in _OF_A_NEW_ONE if getattr(args, key) is not None}


def _to_go_on_with(args: ModelArguments, base_model: PreTrainedModel) -> MLPSpeculatorPreTrainedModel | PeftModel:
    speculator_config(args.speculator)
    if find_adapter_config_file(args.speculator) is not None:
        if args.lora_rank is not None:
            raise ValueError(
                f"`speculator: {args.speculator}` is an adapter, which has its own rank. Drop `lora_rank`."
            )
        adapted = PeftConfig.from_pretrained(args.speculator).base_model_name_or_path
        speculator = AutoModel.from_pretrained(adapted, dtype=torch.float32)
        check_shapes(base_model, speculator)
        return PeftModel.from_pretrained(speculator, args.speculator, is_trainable=True)
    speculator = AutoModel.from_pretrained(args.speculator, dtype=torch.float32)
    check_shapes(base_model, speculator)  # while it still names the base model that it was made for
    trained_for = getattr(speculator.config, "base_model_name_or_path", None)
    if trained_for not in (None, args.base_model):
        logger.warning("%s was trained for %s; it goes on with %s.", args.speculator, trained_for, args.base_model)
    speculator.config.base_model_name_or_path = args.base_model
    speculator.config.base_model_revision = revision_of(args.base_model, args.base_model_revision)
    if args.lora_rank is not None:
        # alpha = 2 r, as peft's guides recommend.
        if isinstance(speculator.speculator, StreamingCell):
            raise ValueError("Streams are adapters themselves, which can be trained further: drop `lora_rank`.")
        config = LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules=_products(speculator))
        return get_peft_model(speculator, config)
    return speculator


def _products(speculator: MLPSpeculatorPreTrainedModel) -> list[str]:
    """All products with weights, but for those that nothing reads; embeddings stay as they are."""
    linears = ((name, part) for name, part in speculator.named_modules() if isinstance(part, torch.nn.Linear))
    return [name for name, part in linears if part.weight.requires_grad]


@torch.no_grad()
def _tie_to_base_model(speculator: MLPSpeculatorPreTrainedModel, base_model: PreTrainedModel) -> None:
    """Frozen copies of its embeddings and LM head, for all heads (open question 4 of arXiv 2404.19124)."""
    config = base_model.config.get_text_config(decoder=True)
    width = config.hidden_size
    if speculator.config.vocab_size != config.vocab_size:
        raise ValueError(
            f"`tie_to_base_model` needs the tokens of the base model, {config.vocab_size}, but the speculator has "
            f"{speculator.config.vocab_size}. Call its `resize_token_embeddings` and save it first."
        )
    if not speculator.config.tie_weights or (speculator.config.inner_dim or width) != width:
        raise ValueError(
            f"`tie_to_base_model` needs a speculator whose heads are tied and as wide as the base model, {width}: one "
            "that was trained with `tie_to_base_model` before."
        )
    pairs = (
        (speculator.get_input_embeddings(), base_model.get_input_embeddings()),
        (speculator.speculator.head[0], base_model.get_output_embeddings()),
    )
    for ours, theirs in pairs:
        if hasattr(theirs.weight, "ds_id"):
            raise ValueError("`tie_to_base_model` needs whole weights, not those of ZeRO-3. Take zero2.yaml.")
        ours.weight.copy_(theirs.weight)
        ours.weight.requires_grad_(False)
