"""Tiny random models of real architectures."""

import copy

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTBigCodeConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import modeling_speculator  # noqa: F401  installs the hook


VOCAB = 64
HIDDEN = 32

# Every family that generation.SUPPORTED_MODEL_TYPES names; num_key_value_heads < num_attention_heads where it can be.
FAMILIES = {
    "llama": LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    ),
    "granite": GraniteConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=128,
        embedding_multiplier=6.0,
        logits_scaling=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
    ),
    "gpt_bigcode": GPTBigCodeConfig(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        n_positions=128,
        multi_query=True,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128, bos_token_id=None, eos_token_id=None
    ),
}


def tiny_model(family: str, attn_implementation: str = "sdpa", seed: int = 0):
    """A random model without special tokens; its weights are so large that greedy text does not loop at once."""
    torch.manual_seed(seed)
    config = copy.deepcopy(FAMILIES[family])  # a model keeps the one it is given
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
