"""Tiny random models of real architectures."""

import copy
import string

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from transformers import (
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

import modeling_speculator  # noqa: F401  installs the hook


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

# Every family that `families.SUPPORTED_MODEL_TYPES` names; num_key_value_heads < num_attention_heads where it can be.
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
# Those that have no sdpa in transformers.
EAGER_ONLY = ("gemma2", "gpt_oss")


def tiny_model(family: str, attn_implementation: str = "sdpa", seed: int = 0, one_layer_of_each_kind: bool = False):
    """A random model without special tokens; its weights are so large that greedy text does not loop at once."""
    torch.manual_seed(seed)
    config = copy.deepcopy(FAMILIES[family])  # a model keeps the one it is given
    if one_layer_of_each_kind and not getattr(config, "layer_types", None):
        config.num_hidden_layers = 1
    attn_implementation = "eager" if family in EAGER_ONLY else attn_implementation
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4 if "head" in name or "emb" in name or "wte" in name else 0.25)
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


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
