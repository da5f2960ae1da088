"""A context layer: what it computes, what it is told in a call, and how it is trained."""

import copy
import gc

import pytest
import torch
from drafters import OracleWithContext, context_speculator
from test_conversation import caches, tokens
from test_drafter_state import GREEDY, SAME, farthest, speculate
from tiny_models import VOCAB, prompts, tiny_model
from torch.nn import functional as F
from trainings import arguments, rows
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from modeling_speculator import context_state
from modeling_speculator.context_vectors import read_text
from modeling_speculator.measuring.acceptance import measure_acceptance
from modeling_speculator.measuring.evaluation import starts_of_drafts
from modeling_speculator.modeling_context import ContextConfig, ContextSpeculator
from modeling_speculator.trainers import (
    ModelArguments,
    SpeculatorTrainer,
    dry_run,
    load_or_create_speculator,
)
from modeling_speculator.transformers_api import CACHE, cache_of


# What it computes


@torch.no_grad()
def test_by_hand(llama):
    """The layer is a Llama layer, between a product before and one after it."""
    speculator = context_speculator(llama)
    layer, text = speculator.speculator.context, tokens(9, rows=2)
    reading = read_text(llama, text[:, :-1], torch.ones_like(text[:, :-1]), [0, 1])
    expected_features = llama(text[:, :-1], output_hidden_states=True).hidden_states[:2]
    torch.testing.assert_close(reading.features, torch.cat(expected_features, -1))

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, rms_norm_eps=1e-5, attn_implementation="eager"
    )
    theirs = LlamaDecoderLayer(config, 0)
    weights = {
        f"self_attn.{name}_proj.weight": part for name, part in zip("qkv", layer.qkv.weight.chunk(3), strict=True)
    }
    gate, up = layer.gate_up.weight.chunk(2)
    weights |= {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}
    weights |= {"self_attn.o_proj.weight": layer.attention_out.weight, "mlp.down_proj.weight": layer.down.weight}
    weights["input_layernorm.weight"] = layer.attention_norm.weight
    weights["post_attention_layernorm.weight"] = layer.mlp_norm.weight
    theirs.load_state_dict(weights)
    token = llama.get_input_embeddings()(text[:, 1:])
    fused = F.rms_norm(reading.features, (64,), layer.fuse_norm.weight, 1e-5) @ layer.fuse.weight.T
    read = [F.rms_norm(token, (32,), layer.token_norm.weight, 1e-5)]
    read += [F.rms_norm(fused, (32,), layer.feature_norm.weight, 1e-5)]
    stream = torch.cat(read, -1) @ layer.proj_in.weight.T
    angles = LlamaRotaryEmbedding(config)(stream, torch.arange(8)[None])
    mask = torch.full((8, 8), -torch.inf).triu(1)[None, None]
    stream = theirs(stream, attention_mask=mask, position_embeddings=angles)
    expected = reading.hidden_states + (stream[0] if isinstance(stream, tuple) else stream) @ layer.proj_out.weight.T
    torch.testing.assert_close(starts_of_drafts(llama, speculator, text, torch.ones_like(text)), expected)


def test_a_new_one_is_a_residual_one(llama):
    speculator = ContextSpeculator(ContextConfig(vocab_size=VOCAB, emb_dim=32, context_heads=2))
    text = tokens(9)
    starts = starts_of_drafts(llama, speculator, text, torch.ones_like(text))
    torch.testing.assert_close(starts, read_text(llama, text[:, :-1], torch.ones_like(text[:, :-1])).hidden_states)


def test_sizes():
    speculator = ContextSpeculator(ContextConfig(vocab_size=100, emb_dim=576, n_predict=5, feature_layers=[2, 15, 27]))
    assert speculator.num_parameters() == pytest.approx(10.3e6, rel=0.01)
    assert speculator.config.n_context_heads == 9
    plain = ContextSpeculator(ContextConfig(vocab_size=100, emb_dim=576, n_predict=5))
    assert plain.num_parameters() == pytest.approx(9.3e6, rel=0.01)


# In the loop


def test_a_prompt_that_is_computed_in_parts(llama, monkeypatch):
    monkeypatch.setattr(context_state, "PROMPT_PART", 4)
    assert farthest(*speculate(llama, context_speculator(llama), prompts())) < SAME


def test_turned_off_it_keeps_nothing(llama, monkeypatch):
    monkeypatch.setattr(context_state.ContextState, "__init__", None)
    monkeypatch.setattr("modeling_speculator.context_vectors.decoder_layers", None)
    speculator = context_speculator(llama, n_candidates=0)
    assert llama.generate(**prompts(), **GREEDY, assistant_model=speculator).shape == (3, 33)


# What a call did not compute


def test_inputs_embeds(llama):
    """Of the prompt only embeddings are known: the layer begins with the first token that is emitted."""
    speculator, text = context_speculator(llama), tokens(7)
    embeds = llama.get_input_embeddings()(text).detach()
    expected = llama.generate(inputs_embeds=embeds, **GREEDY)
    assert llama.generate(inputs_embeds=embeds, **GREEDY, assistant_model=speculator).tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gpt_bigcode", "gemma3_text"])
def test_a_second_turn_knows_the_first(family, kind):
    """What was computed in the first is remembered beside its cache: all is as in one pass over both."""
    model = tiny_model(family)
    speculator = context_speculator(model)
    cache, plain_cache = caches(model)[kind](), caches(model)[kind]()

    def turn(text):
        """The whole text, and how far from one pass over it the drafts of this turn start."""
        options = GREEDY | {"max_new_tokens": 16, "return_dict_in_generate": True}
        options["attention_mask"] = torch.ones_like(text)
        expected = model.generate(text, **options | {CACHE: plain_cache}).sequences
        oracle = OracleWithContext(model, speculator, expected, p_right=0.7)
        out = model.generate(text, **options | {CACHE: cache}, assistant_model=oracle)
        assert out.sequences.tolist() == expected.tolist()
        return out.sequences, farthest(oracle, out)

    text, distance = turn(tokens(5, 1))
    assert distance < SAME
    text, distance = turn(torch.cat([text, tokens(4, 2)], dim=1))
    assert distance < SAME
    context_state._remembered.clear()  # without what is remembered it is otherwise
    _, distance = turn(torch.cat([text, tokens(3, 5)], dim=1))
    assert distance > 100 * SAME


@pytest.mark.parametrize("change", ["crop", "a token", "the last token", "mask", "copy"])
def test_what_of_it_still_fits(llama, monkeypatch, change):
    """As much as comes before the first difference; a copied cache is another one."""
    speculator, seen = context_speculator(llama), []
    prefill = context_state.ContextState.prefill
    monkeypatch.setattr(
        context_state.ContextState,
        "prefill",
        lambda self, prompt, cache: (prefill(self, prompt, cache), seen.append((self, prompt)))[0],
    )
    options = GREEDY | {"max_new_tokens": 6, "return_dict_in_generate": True, "assistant_model": speculator}
    first = llama.generate(tokens(8), attention_mask=torch.ones(1, 8).long(), **options)
    cache, text = cache_of(first), torch.cat([first.sequences, tokens(3, 2)], dim=1)
    mask, n_known = torch.ones_like(text), 13  # pairs in the cache
    if change == "crop":
        cache.crop(-4)
        n_known = 9
    elif change == "a token":
        text[0, 5] = (text[0, 5] + 1) % VOCAB
        n_known = 4
    elif change == "the last token":
        text[0, 13] = (text[0, 13] + 1) % VOCAB
        n_known = 12
    elif change == "mask":
        mask[:, :3] = 0
        n_known = 10
    else:
        cache, n_known = copy.deepcopy(cache), 0
    llama.generate(text, attention_mask=mask, **options | {CACHE: cache})
    state, prompt = seen[-1]
    assert int(state.known[:, : prompt.first_column].sum()) == n_known
    assert state.past is None  # what is taken over is not kept twice


def test_a_cache_that_was_not_ours(llama):
    """Nothing is known of what it holds; what comes after has its true positions."""
    speculator, text = context_speculator(llama), tokens(12)
    first = llama.generate(text, **GREEDY, return_dict_in_generate=True)
    text = torch.cat([first.sequences, tokens(3, 2)], dim=1)
    given = {"attention_mask": torch.ones_like(text), CACHE: cache_of(first)}
    expected = llama.generate(text, **GREEDY)
    drafted = []
    bound = speculator.beside(llama)

    class Watched(OracleWithContext):
        def generate_candidates(self, hidden_states, input_ids, n_candidates=None):
            drafted.append(hidden_states.clone())
            return bound.generate_candidates(hidden_states, input_ids, n_candidates=5)

    out = llama.generate(text, **GREEDY, **given, assistant_model=Watched(llama, speculator, expected))
    assert out.tolist() == expected.tolist()
    # As in one pass whose earlier pairs are hidden.
    begins = first.sequences.shape[1] - 1
    reading = read_text(llama, expected[:, :-1], torch.ones_like(expected[:, :-1]), [0, 1])
    segments = (torch.arange(expected.shape[1] - 1) >= begins).long()[None]
    starts = bound.with_context(reading.hidden_states, expected[:, 1:], reading.features, segments)
    torch.testing.assert_close(drafted[0][0, 0], starts[0, text.shape[1] - 1], rtol=1e-4, atol=1e-4)


def test_what_is_remembered_goes_with_the_cache(llama):
    out = llama.generate(
        **prompts(1), **GREEDY, assistant_model=context_speculator(llama), return_dict_in_generate=True
    )
    cache = cache_of(out)
    assert cache in context_state._remembered
    del out, cache
    gc.collect()
    assert len(context_state._remembered) == 0


def test_simulated_steps_are_the_loops(llama):
    for record in measure_acceptance(llama, context_speculator(llama), **prompts(), **GREEDY):
        assert record.emitted_per_step == record.simulated_per_step


# What is refused


def test_bad_configs(llama):
    shape = {"vocab_size": VOCAB, "emb_dim": 32}
    with pytest.raises(ValueError, match="can't be split into 3 heads"):
        ContextConfig(**shape, context_heads=3)
    with pytest.raises(ValueError, match="`context_inner_dim` must be an integer"):
        ContextConfig(**shape, context_inner_dim=-1)
    with pytest.raises(ValueError, match="`rope_theta` must be a number above 1"):
        ContextConfig(**shape, rope_theta=0)
    for layers in ([-1], [1, 1], [True], 3):
        with pytest.raises(ValueError, match="`feature_layers` must be a list of different integers"):
            ContextConfig(**shape, feature_layers=layers)
    with pytest.raises(ValueError, match="`method: residual` has no feature_layers"):
        load_or_create_speculator(ModelArguments(base_model="x", method="residual", feature_layers=[0]), llama)


def test_a_layer_that_is_not_there(llama, tmp_path):
    speculator = context_speculator(llama, feature_layers=[0, 2])
    with pytest.raises(ValueError, match="a layer that LlamaForCausalLM does not have: it has 2"):
        llama.generate(**prompts(), assistant_model=speculator)
    with pytest.raises(ValueError, match="does not have"):
        SpeculatorTrainer(speculator, llama, arguments(tmp_path), train_dataset=rows(2, 12))
    own = OracleWithContext(llama, context_speculator(llama), tokens(9))
    own.config.feature_layers = [7]
    with pytest.raises(ValueError, match=r"`feature_layers=\[7\]` names a layer"):
        llama.generate(**prompts(), assistant_model=own)
    llama.save_pretrained(tmp_path / "base")
    flags = ["--base_model", str(tmp_path / "base"), "--method", "context", "--context_heads", "2", "--stage", "1"]
    with pytest.raises(ValueError, match="names a layer that LlamaForCausalLM does not have"):
        dry_run([*flags, "--feature_layers", "9", "--data_files", __file__, "--output_dir", str(tmp_path / "out")])


def test_tensors_that_are_missing(llama):
    speculator = context_speculator(llama)
    states, ids = torch.randn(1, 4, 32), tokens(6)
    with pytest.raises(ValueError, match="pass `base_model`"):
        speculator(states, ids)
    with pytest.raises(ValueError, match="needs `features`"):
        speculator(states, ids, base_model=llama)
    assert speculator(states, ids, base_model=llama, features=torch.randn(1, 4, 64)).logits.shape == (3, 1, 4, VOCAB)
    with pytest.raises(ValueError, match="has no use for `features`"):
        context_speculator(llama, feature_layers=[])(states, ids, base_model=llama, features=torch.randn(1, 4, 64))
