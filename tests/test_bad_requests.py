"""What can't be honoured raises a ValueError that names it, before any forward."""

import copy

import pytest
import torch
from drafters import Oracle
from tiny_models import FAMILIES, HIDDEN, VOCAB, tiny_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    FalconConfig,
    LlamaConfig,
    MambaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2Config,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
    XGLMConfig,
)

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel


TINY = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def speculator(**config):
    config = {"vocab_size": VOCAB, "emb_dim": HIDDEN} | config
    return MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(**config)).eval()


def refuses(model, match, drafter=None, input_ids=None, **options):
    def forward(*args, **kwargs):
        raise AssertionError("a forward ran before the request was refused")

    input_ids = torch.arange(1, 5)[None] if input_ids is None else input_ids
    options = {"max_new_tokens": 4} | options
    handles = [module.register_forward_pre_hook(forward) for module in model.modules()]
    try:
        with pytest.raises(ValueError, match=match):
            model.generate(input_ids, assistant_model=drafter or speculator(), **options)
    finally:
        for handle in handles:
            handle.remove()


def static_cache(model, length):
    return StaticCache(config=model.config, max_cache_len=length)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_beams": 2}, "can't be combined with beam search.*num_beams=1"),
        ({"num_beams": 2, "do_sample": True}, "beam"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "(?i)contrastive search"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"token_healing": True}, "token_healing"),
        ({"dola_layers": "low"}, "dola_layers"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"assistant_early_exit": 1}, "assistant_early_exit"),
        ({"force_words_ids": [[3]], "num_beams": 2}, "(?i)constrained beam search"),
        ({"position_ids": torch.zeros(3, 1, 4, dtype=torch.long)}, "`position_ids` must have the shape"),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, r"`attention_mask` has shape \(1, 3\).*have \(1, 4\)"),
        ({"attention_mask": torch.ones(1, 5, dtype=torch.long)}, r"`attention_mask` has shape \(1, 5\)"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1]] * 2)}, r"`attention_mask` has shape \(2, 4\)"),
        ({"stop_strings": "a"}, "tokenizer"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_options(llama, options, match):
    refuses(llama, match, **options)


def test_caches(llama):
    prompt = torch.arange(1, 5)[None]
    cache = llama(prompt, use_cache=True).past_key_values
    refuses(llama, "batch of 1, but the inputs are of one of 2", input_ids=prompt.repeat(2, 1), past_key_values=cache)
    refuses(llama, "holds 4 tokens already, all of the 4.*crop", past_key_values=cache)
    refuses(llama, "static cache of 6 tokens.*needs 7", past_key_values=static_cache(llama, 6))
    refuses(llama, "offloaded", past_key_values=DynamicCache(offloading=True))
    refuses(llama, "`use_cache=False` beside a", past_key_values=DynamicCache(), use_cache=False)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    options = {"input_ids": prompt.repeat(2, 1), "attention_mask": mask, "past_key_values": DynamicCache()}
    refuses(llama, "only if no row is padded", **options)
    options = {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]]), "past_key_values": cache}
    refuses(llama, r"shape \(1, 7\), but the inputs have \(1, 4\) and the cache 4 tokens more", **options)


def test_an_empty_prompt(llama):
    refuses(llama, "The prompt is empty", input_ids=torch.zeros(1, 0, dtype=torch.long))


def test_a_streamer_of_a_batch(llama):
    refuses(llama, "batch size 1", input_ids=torch.ones(2, 4, dtype=torch.long), streamer=TextStreamer(None))


def test_a_speculator_for_another_model(llama):
    other = speculator(emb_dim=16, base_model_name_or_path="org/other")
    refuses(llama, f"`emb_dim=16`.*`hidden_size={HIDDEN}`.*made for org/other", other)


def test_a_speculator_on_another_device(llama):
    refuses(llama, r"on meta .*speculator.to\('cpu'\)", speculator().to("meta"))


@pytest.mark.parametrize("attn_implementation", ["flex_attention", "flash_attention_2"])
def test_attention_without_tree_masks(llama, attn_implementation):
    model = copy.deepcopy(llama)
    model.config._attn_implementation = attn_implementation
    refuses(model, f"attn_implementation='{attn_implementation}'.*sdpa")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=1, n_head=2), "ALiBi"),
        (
            FalconConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, alibi=True),
            "ALiBi",
        ),
        (MambaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=1), "recurrent"),
        (XGLMConfig(vocab_size=VOCAB, d_model=HIDDEN, num_layers=1, attention_heads=2, ffn_dim=48), "not known"),
    ],
)
def test_families_that_are_not_supported(config, reason):
    model = AutoModelForCausalLM.from_config(config).eval()
    refuses(model, f"not supported for {type(model).__name__}.*{reason}.*Generate without")


def test_layers_of_another_kind():
    config = Qwen2Config(**TINY, layer_types=["chunked_attention"])
    refuses(AutoModelForCausalLM.from_config(config).eval(), "Layers of type chunked_attention")


def test_a_model_around_a_supported_one():
    """PaliGemma counts the positions of its text from 1."""
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": HIDDEN}
    text = {"model_type": "gemma", **TINY, "num_key_value_heads": 1, "head_dim": 16}
    config = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=63, projection_dim=HIDDEN)
    refuses(PaliGemmaForConditionalGeneration(config).eval(), "PaliGemma.*a model around one that is, only for gemma3")


def test_positions_that_depend_on_the_draft():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY, rope_parameters=rope)).eval()
    refuses(model, "rope_type='dynamic'")
    config = copy.deepcopy(FAMILIES["gemma3_text"])  # one kind for each type of layer
    config.rope_parameters["full_attention"] = rope
    refuses(AutoModelForCausalLM.from_config(config).eval(), "rope_type='dynamic'")


def test_encoder_decoder():
    config = T5Config(vocab_size=VOCAB, d_model=HIDDEN, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    refuses(T5ForConditionalGeneration(config).eval(), "encoder-decoder")


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode"])
def test_more_tokens_than_positions(family):
    model = tiny_model(family)
    refuses(model, "129 tokens.*128 positions.*max_new_tokens", max_new_tokens=126)
    out = model.generate(torch.arange(1, 5)[None], assistant_model=speculator(), max_new_tokens=125, do_sample=False)
    assert out.shape == (1, 129)  # the last token is never run, so it needs no position


def test_a_drafter_that_drafts_more_than_it_says(llama):
    text = torch.ones(1, 12, dtype=torch.long)
    drafter = Oracle(llama, text)
    five = drafter.generate_candidates
    drafter.config.n_candidates, drafter.generate_candidates = 4, lambda *inputs: five(*inputs).repeat(1, 2, 1)
    with pytest.raises(ValueError, match=r"\(1, 8, 3\) tokens, more than its config's \(1, 4, 3\)"):
        llama.generate(text[:, :4], assistant_model=drafter, max_new_tokens=4, do_sample=False)


def test_training_with_gradient_checkpointing():
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable()  # of which newer releases warn
    refuses(model, r"gradient checkpointing.*eval\(\)")


def test_dials_that_do_not_fit(llama):
    drafter = speculator()
    drafter.config.n_candidates = 31
    refuses(llama, "`n_candidates`.*between 0 and 30.*31", drafter)
    drafter.config.n_candidates, drafter.config.top_k_tokens_per_head = 5, [5, 3]
    refuses(llama, "one number for each of the 3 heads", drafter)
