"""Tiny random models of real architectures."""

import copy
import string

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from modeling_speculator import families  # and its import installs the hook


VOCAB = 64
HIDDEN = 32

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_WINDOW = {"sliding_window": 7}  # shorter than most texts of the tests
_TWO_KINDS = _WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT2_SIZES = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}

# Those that many tests run on; num_key_value_heads < num_attention_heads where it can be. Others: `tiny_config`.
FAMILIES = {
    "llama": LlamaConfig(**_SIZES),
    "granite": GraniteConfig(
        **_SIZES | {"num_key_value_heads": 1},
        embedding_multiplier=6.0,
        logits_scaling=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
    ),
    "gpt_bigcode": GPTBigCodeConfig(**_GPT2_SIZES, multi_query=True),
    "gpt2": GPT2Config(**_GPT2_SIZES),
    "cohere": CohereConfig(**_SIZES, logit_scale=0.5),
    "cohere2": Cohere2Config(**_SIZES, **_TWO_KINDS),
    "gemma": GemmaConfig(**_SIZES),
    "gemma2": Gemma2Config(**_SIZES, **_TWO_KINDS, final_logit_softcapping=10.0, attn_logit_softcapping=5.0),
    "gemma3_text": Gemma3TextConfig(**_SIZES, **_TWO_KINDS),
    "gpt_neox": GPTNeoXConfig(**_SIZES),
    "gpt_oss": GptOssConfig(**_SIZES, **_TWO_KINDS, num_local_experts=4, num_experts_per_tok=2),
    "granitemoe": GraniteMoeConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2),
    "mistral": MistralConfig(**_SIZES, **_WINDOW),
    "mixtral": MixtralConfig(**_SIZES, **_WINDOW, num_local_experts=4, num_experts_per_tok=2),
    "olmo2": Olmo2Config(**_SIZES),
    "phi": PhiConfig(**_SIZES, partial_rotary_factor=0.5),
    "phi3": Phi3Config(**_SIZES, **_WINDOW),
    "qwen2": Qwen2Config(**_SIZES, **_TWO_KINDS, use_sliding_window=True),
    "qwen2_moe": Qwen2MoeConfig(**_SIZES, **_EXPERTS, shared_expert_intermediate_size=24),
    "qwen3": Qwen3Config(**_SIZES, **_TWO_KINDS, use_sliding_window=True),
    "qwen3_moe": Qwen3MoeConfig(**_SIZES, **_EXPERTS),
    "smollm3": SmolLM3Config(**_SIZES, **_TWO_KINDS, use_sliding_window=True),
    "stablelm": StableLmConfig(**_SIZES),
    "starcoder2": Starcoder2Config(**_SIZES, **_WINDOW, use_bias=False),
}
# What configs call their sizes, in whichever family.
_EVERY_SIZE = (
    _SIZES
    | _GPT2_SIZES
    | _WINDOW
    | {
        "n_inner": 48,
        "n_ctx": 128,
        "rotary_dim": 8,
        "ffn_dim": 48,
        "ffn_hidden_size": 48,
        "word_embed_proj_dim": 32,
        "dim_model_base": 32,
        # Experts.
        "num_experts": 4,
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "moe_num_experts": 4,
        "num_experts_per_tok": 2,
        "num_experts_per_token": 2,
        "moe_k": 2,
        "moe_topk": 2,
        "moe_intermediate_size": 24,
        "expert_ffn_hidden_size": 24,
        "shared_intermediate_size": 48,
        "shared_expert_intermediate_size": 24,
        "n_shared_experts": 1,
        "num_shared_experts": 1,
        "zero_expert_num": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_dense_layers": 1,
        "moe_layer_start_index": 0,
        # Attention over compressed keys, whose heads are as many as those of queries.
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "qk_head_dim": 16,
        "v_head_dim": 8,
        # Layers of two kinds with sizes of their own.
        "global_head_dim": 8,
        "num_global_key_value_heads": 2,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "swa_v_head_dim": 8,
    }
)
_SHARED_KEYS = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _TWO_KINDS["layer_types"] * 2}
_SPECIAL = {  # what is wanted otherwise
    "cwm": {"bos_token_id": 0, "eos_token_id": [1], "pad_token_id": 0},
    "gemma3n_text": _SHARED_KEYS
    | {
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "laurel_rank": 4,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
    },
    "gemma4_text": _SHARED_KEYS | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
    "granitemoehybrid": {"layer_types": ["attention"] * 2, "mamba_n_heads": 8, "mamba_expand": 2, "mamba_d_head": 8},
}


def tiny_config(model_type: str, masks: str = "one", **changes):
    """Of any model type, in the sizes that its config knows; of two layers, one of each kind.

    Args:
        masks: of `families.Family`.
    """
    config_class = CONFIG_MAPPING[model_type]
    known = {name for part in config_class.__mro__ for name in getattr(part, "__annotations__", {})}
    sizes = {name: size for name, size in _EVERY_SIZE.items() if name in known | set(config_class.attribute_map)}
    if "kv_lora_rank" in known:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if masks == "layer types":
        sizes |= _TWO_KINDS | ({"use_sliding_window": True} if "use_sliding_window" in known else {})
    return config_class(**sizes | _SPECIAL.get(model_type, {}) | changes)


def tiny_model(family: str, attn_implementation: str = "sdpa", seed: int = 0, one_layer_of_each_kind: bool = False):
    """A random model without special tokens; its weights are so large that greedy text does not loop at once."""
    torch.manual_seed(seed)
    known = FAMILIES.get(family) or tiny_config(family, families.FAMILIES[family].masks)
    config = copy.deepcopy(known)  # a model keeps the one it is given
    if one_layer_of_each_kind and not getattr(config, "layer_types", None):
        config.num_hidden_layers = 1
    attn_implementation = attn_implementation if has_sdpa(family) else "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4 if "head" in name or "emb" in name or "wte" in name else 0.25)
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def has_sdpa(family: str) -> bool:
    """Whether this release of transformers has it for a family, and takes the cap that Gemma 2 puts on its scores."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    return model_class._supports_sdpa and family != "gemma2"


def word_tokenizer(words: list[str], **special_tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the given words; any other word is the first."""
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def character_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer of VOCAB single characters, letters and digits among them; any other is a full stop."""
    characters = (string.ascii_letters + string.digits + ".,")[:VOCAB]
    tokenizer = Tokenizer(WordLevel({c: n for n, c in enumerate(characters)}, unk_token="."))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special_tokens)


def prompts(rows=3):
    """Up to three left-padded prompts, of 9, 4 and 1 tokens, and their mask: what `generate` takes."""
    generator = torch.Generator().manual_seed(5)
    input_ids, mask = torch.zeros(rows, 9, dtype=torch.long), torch.zeros(rows, 9, dtype=torch.long)
    for row, length in enumerate([9, 4, 1][:rows]):
        input_ids[row, 9 - length :] = torch.randint(1, VOCAB, (length,), generator=generator)
        mask[row, 9 - length :] = 1
    return {"input_ids": input_ids, "attention_mask": mask}
