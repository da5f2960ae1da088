"""The base models whose output is known to be reproduced, and what their decoders expect of attention masks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from .transformers_api import is_stateful


@dataclass(frozen=True)
class Family:
    """What the loop must know of the decoders of one model type.

    Attributes:
        checkpoint: one that many people run; empty where none is known.
        masks: "one": every layer attends to all tokens before; "window": every layer to those in a window, where the
            config has one; "layer types": the config says of each layer which of the two.
        has_position_table: whether positions are looked up in a table, which ends.
        embeds_token_types: whether an embedding for the type of each token is added, be it 0. To others a type is what
            marks an image.
    """

    checkpoint: str
    masks: str = "one"
    has_position_table: bool = False
    embeds_token_types: bool = False


MASKS = ("one", "window", "layer types")

# A family is added with a line here, and tests/test_families.py decides whether it is right: a single causal mask for
# all layers of Mistral, say, would silently drop its window.
FAMILIES: dict[str, Family] = {
    "afmoe": Family("arcee-ai/Trinity-Mini", "layer types"),
    "apertus": Family("swiss-ai/Apertus-8B-Instruct-2509"),
    "arcee": Family("arcee-ai/AFM-4.5B"),
    "biogpt": Family("microsoft/biogpt", has_position_table=True),
    "bitnet": Family("microsoft/bitnet-b1.58-2B-4T"),
    "codegen": Family("Salesforce/codegen-2B-mono", has_position_table=True),
    "cohere": Family("CohereLabs/c4ai-command-r-v01"),
    "cohere2": Family("CohereLabs/c4ai-command-r7b-12-2024", "layer types"),
    "cohere2_moe": Family("", "layer types"),
    "cwm": Family("facebook/cwm", "layer types"),
    "deepseek_v2": Family("deepseek-ai/DeepSeek-V2-Lite"),
    "deepseek_v3": Family("deepseek-ai/DeepSeek-V3.1"),
    "diffllama": Family("kajuma/DiffLlama-0.3B-handcut"),
    "dots1": Family("rednote-hilab/dots.llm1.inst", "layer types"),
    "ernie4_5": Family("baidu/ERNIE-4.5-0.3B-PT"),
    "ernie4_5_moe": Family("baidu/ERNIE-4.5-21B-A3B-PT"),
    "exaone": Family("LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct"),
    "exaone4": Family("LGAI-EXAONE/EXAONE-4.0-1.2B", "layer types"),
    "exaone_moe": Family("LGAI-EXAONE/K-EXAONE-236B-A23B", "layer types"),
    "falcon": Family("tiiuae/falcon-7b-instruct"),
    "flex_olmo": Family("allenai/FlexOlmo-7x7B-1T"),
    "gemma": Family("google/gemma-7b"),
    "gemma2": Family("google/gemma-2-9b", "layer types"),
    "gemma3_text": Family("google/gemma-3-1b-it", "layer types"),
    "gemma3n_text": Family("google/gemma-3n-E4B-it", "layer types"),
    "gemma4_text": Family("google/gemma-4-E4B-it", "layer types"),
    "glm": Family("THUDM/glm-4-9b-chat-hf"),
    "glm4": Family("zai-org/GLM-4-9B-0414"),
    "glm4_moe": Family("zai-org/GLM-4.5-Air"),
    "glm4_moe_lite": Family("zai-org/GLM-4.7-Flash"),
    "gpt2": Family("openai-community/gpt2", has_position_table=True, embeds_token_types=True),
    "gpt_bigcode": Family("bigcode/starcoder", has_position_table=True, embeds_token_types=True),
    "gpt_neox": Family("EleutherAI/pythia-6.9b"),
    "gpt_oss": Family("openai/gpt-oss-20b", "layer types"),
    "gptj": Family("EleutherAI/gpt-j-6b", has_position_table=True),
    "granite": Family("ibm-granite/granite-3.3-8b-instruct"),
    "granite_swa": Family("", "layer types"),
    "granitemoe": Family("ibm-granite/granite-3.1-3b-a800m-instruct"),
    "granitemoe_swa": Family("", "layer types"),
    "granitemoehybrid": Family("ibm-granite/granite-4.0-350m"),
    "granitemoeshared": Family("ibm-research/moe-7b-1b-active-shared-experts"),
    "helium": Family("kyutai/helium-1-2b"),
    "hunyuan_v1_dense": Family("tencent/Hunyuan-7B-Instruct"),
    "hunyuan_v1_moe": Family("tencent/Hunyuan-A13B-Instruct"),
    "hy_v3": Family(""),
    "hyperclovax": Family("naver-hyperclovax/HyperCLOVAX-SEED-Think-14B"),
    "internlm3": Family("internlm/internlm3-8b-instruct"),
    "jais2": Family(""),
    "jetmoe": Family("jetmoe/jetmoe-8b"),
    "laguna": Family("", "layer types"),
    "llama": Family("meta-llama/Llama-3.1-8B-Instruct"),
    "longcat_flash": Family("meituan-longcat/LongCat-Flash-Chat"),
    "mellum": Family("", "layer types"),
    "mimo_v2_flash": Family("XiaomiMiMo/MiMo-V2-Flash", "layer types"),
    "minicpm3": Family("openbmb/MiniCPM3-4B"),
    "minimax_m2": Family("MiniMaxAI/MiniMax-M2"),
    "ministral": Family("mistralai/Ministral-8B-Instruct-2410", "layer types"),
    "ministral3": Family("mistralai/Ministral-3-8B-Instruct-2512", "window"),
    "mistral": Family("mistralai/Mistral-7B-Instruct-v0.3", "window"),
    "mixtral": Family("mistralai/Mixtral-8x7B-Instruct-v0.1", "window"),
    "nanochat": Family("karpathy/nanochat-d32"),
    "nemotron": Family("nvidia/Minitron-8B-Base"),
    "olmo": Family("allenai/OLMo-7B-hf"),
    "olmo2": Family("allenai/OLMo-2-1124-7B"),
    "olmo3": Family("allenai/Olmo-3-7B-Instruct", "layer types"),
    "olmoe": Family("allenai/OLMoE-1B-7B-0924"),
    "opt": Family("facebook/opt-6.7b", has_position_table=True),
    "persimmon": Family("adept/persimmon-8b-chat"),
    "phi": Family("microsoft/phi-2"),
    "phi3": Family("microsoft/Phi-3-mini-4k-instruct", "window"),
    "phimoe": Family("microsoft/Phi-3.5-MoE-instruct", "window"),
    "qwen2": Family("Qwen/Qwen2.5-7B-Instruct", "layer types"),
    "qwen2_moe": Family("Qwen/Qwen1.5-MoE-A2.7B", "layer types"),
    "qwen3": Family("Qwen/Qwen3-8B", "layer types"),
    "qwen3_moe": Family("Qwen/Qwen3-30B-A3B", "window"),
    "seed_oss": Family("ByteDance-Seed/Seed-OSS-36B-Instruct"),
    "smollm3": Family("HuggingFaceTB/SmolLM3-3B", "layer types"),
    "solar_open": Family("upstage/Solar-Open-100B"),
    "stablelm": Family("stabilityai/stablelm-2-1_6b"),
    "starcoder2": Family("bigcode/starcoder2-7b", "window"),
    "vaultgemma": Family("google/vaultgemma-1b", "layer types"),
    "youtu": Family(""),
}

# Models around one of these whose text is decoded as the text model alone decodes it. (PaliGemma's is not: its
# positions start at 1.)
AROUND_A_TEXT_MODEL = {
    "gemma3": "google/gemma-3-4b-it",
    "gemma4": "google/gemma-4-31B-it",
    "idefics3": "HuggingFaceM4/Idefics3-8B-Llama3",
    "internvl": "OpenGVLab/InternVL3-8B-hf",
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava_next": "llava-hf/llava-v1.6-mistral-7b-hf",
    "mistral3": "mistralai/Mistral-Small-3.2-24B-Instruct-2506",
    "smolvlm": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
}

_INDEXED = "its attention reads the tokens that an indexer picks, whose own cache the loop does not keep"
_SEVERAL_ROWS = "its positions have several rows, one for each axis of an image"
_NO_CONTINUATION = "its forward goes on from a recurrent state with one token at a time, so that no draft is verified"
_ALIBI = "it has ALiBi positions, which go by the order of keys in the cache"
# Why some are not served, where `check_family` does not find it in the config.
NOT_SERVED = {
    "bloom": _ALIBI,
    "deepseek_v32": _INDEXED,
    "gpt_neo": "its attention masks keys by their order in the cache, which is free here",
    "deepseek_v4": "its attention reads compressed keys, from which a rejected token can't be taken back",
    "falcon_mamba": _NO_CONTINUATION,
    "glm_moe_dsa": _INDEXED,
    "jamba": _NO_CONTINUATION,
    "llama4_text": "some of its layers attend within chunks of the text, a pattern that the loop has no mask for",
    "mamba": _NO_CONTINUATION,
    "mpt": _ALIBI,
    "qwen2_5_vl_text": _SEVERAL_ROWS,
    "qwen2_vl_text": _SEVERAL_ROWS,
    "qwen3_vl_moe_text": _SEVERAL_ROWS,
    "qwen3_vl_text": _SEVERAL_ROWS,
}
# Those with a recurrent state whose forward goes on from it with several tokens at once: they verify chains.
CHAINS = {
    "bamba": "ibm-ai-platform/Bamba-9B-v2",
    "falcon_h1": "tiiuae/Falcon-H1-7B-Instruct",
    "granitemoehybrid": "ibm-granite/granite-4.0-h-small",
    "lfm2": "LiquidAI/LFM2-1.2B",
    "lfm2_moe": "LiquidAI/LFM2-8B-A1B",
    "nemotron_h": "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
    "olmo_hybrid": "allenai/Olmo-Hybrid-7B",
    "qwen3_5_moe_text": "Qwen/Qwen3.5-35B-A3B",
    "qwen3_5_text": "Qwen/Qwen3.5-9B",
    "qwen3_next": "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "zamba2": "Zyphra/Zamba2-7B-Instruct",
}
# What layers may be called that attend to tokens, and keep nothing but their keys and values.
_ATTENTION = {"attention", "full_attention", "sliding_attention"}
_STATES = {"conv", "linear_attention", "mamba", "recurrent"}  # and that keep a state of all tokens before


def has_recurrent_state(model: PreTrainedModel) -> bool:
    """Whether some layers keep a state of all tokens before, in place of their keys and values."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type in CHAINS and config.model_type not in FAMILIES:
        return True
    kinds, others = _kinds_of_layers(config)
    return not _STATES.isdisjoint(others) or (is_stateful(model) and bool(others or not kinds))


def _kinds_of_layers(config: PreTrainedConfig) -> tuple[set[str], list[str]]:
    """All, and those that are no attention to tokens."""
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    return kinds, sorted(kinds - _ATTENTION)


def obstacle(model: PreTrainedModel) -> str | None:
    """Why the loop can't serve base models of a type, if that is known."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type in NOT_SERVED:
        return NOT_SERVED[config.model_type]
    if config.model_type not in CHAINS and has_recurrent_state(model):
        others = _kinds_of_layers(config)[1]
        of = f", in layers of type {', '.join(others)}" if others else ""
        return f"it has a recurrent state{of}, from which a rejected token can't be taken back"
    return _ALIBI if getattr(config, "alibi", False) else None


def check_family(model: PreTrainedModel) -> None:
    """Raises a ValueError where the loop does not know how a base model's decoder attends, or knows that it can't."""
    config, name, reason = model.config.get_text_config(decoder=True), type(model).__name__, obstacle(model)
    if reason is None and config.model_type not in FAMILIES and config.model_type not in CHAINS:
        reason = (
            "it is not known. `python -m modeling_speculator.doctor --base_model ...` finds out whether it can be "
            "served, and how; docs/families.md lists those that are"
        )
    if reason is not None:
        raise ValueError(
            f"Speculation is not supported for {name} (model type {config.model_type!r}): {reason}. Generate without "
            "`assistant_model`."
        )
    if model.config.model_type not in (config.model_type, *AROUND_A_TEXT_MODEL):
        raise ValueError(
            f"Speculation is not supported for {name} (model type {model.config.model_type!r}), a model around one "
            f"that is, only for {', '.join(AROUND_A_TEXT_MODEL)}. Generate without `assistant_model`."
        )


def register_family(model_type: str, masks: str = "one", like: str | None = None) -> None:
    """Lets the loop serve base models of another type. `python -m modeling_speculator.doctor` proves such a line.

    Args:
        model_type: as its (text) config has it.
        masks: of `Family`.
        like: a model type of the table, from which all else is taken.

    Raises:
        ValueError: for masks or a type that there are not.
    """
    if masks not in MASKS:
        raise ValueError(f"`masks` must be one of {', '.join(map(repr, MASKS))}, but is {masks!r}.")
    if like is not None and like not in FAMILIES:
        raise ValueError(f"`like={like!r}` is no family that is known: {', '.join(FAMILIES)}.")
    known = Family("", masks) if like is None else FAMILIES[like]
    FAMILIES[model_type] = replace(known, checkpoint="", masks=masks)


def family_of(config: PreTrainedConfig) -> Family:
    """Of a text model's config, whose type is one of the table; of what verifies chains, which need no mask, any."""
    return FAMILIES.get(config.model_type) or Family(CHAINS[config.model_type])


def attention_windows(config: PreTrainedConfig) -> dict[str | None, int | None]:
    """The masks that a decoder expects: {type of layer: how many tokens back it attends to, None for all}.

    A single key None stands for one mask for all layers.

    Raises:
        ValueError: for a type of layer that has another pattern of attention.
    """
    masks = family_of(config).masks
    if masks == "layer types":
        windows = {"full_attention": None, "sliding_attention": config.sliding_window}
        unknown = set(config.layer_types) - windows.keys()
        if unknown:
            raise ValueError(
                f"Layers of type {', '.join(sorted(unknown))} take no mask of a candidate tree. "
                "Generate without `assistant_model`."
            )
        return {kind: windows[kind] for kind in sorted(set(config.layer_types))}
    return {None: config.sliding_window if masks == "window" else None}


def mask_kinds(config: PreTrainedConfig) -> tuple[str | None, ...]:
    """Of each layer of a decoder, which of the masks of `attention_windows` it takes."""
    if family_of(config).masks == "layer types":
        return tuple(config.layer_types)
    return (None,) * config.num_hidden_layers


def final_norm(base_model: PreTrainedModel) -> nn.Module:
    """The norm after the last layer of a base model's decoder, of which context vectors come out."""
    decoder = base_model.get_decoder()
    for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm", "layer_norm"):
        if hasattr(decoder, name):
            return getattr(decoder, name)
    raise ValueError(f"The final norm of {type(base_model).__name__} was not found, which streams go through.")


def shares_keys(base_model: PreTrainedModel) -> bool:
    """Whether the last layers of a decoder attend to keys of earlier ones, as Gemma 3n's and small Gemma 4's.

    Where only the last logits are asked for, such layers may leave out all tokens but the last.
    """
    return bool(getattr(base_model.config.get_text_config(decoder=True), "num_kv_shared_layers", None))


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
    config = base_model.config.get_text_config(decoder=True)
    n_layers = config.num_hidden_layers
    if feature_layers and hasattr(config, "altup_num_inputs"):  # Gemma 3n
        raise ValueError(
            f"The layers of {type(base_model).__name__} pass on several states of each token: `feature_layers` can't "
            "be read. Leave it out."
        )
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
