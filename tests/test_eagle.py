"""EAGLE's layer: what a draft is made of, by hand."""

import pytest
import torch
from drafters import eagle3_speculator, eagle_speculator
from test_conversation import tokens
from tiny_models import VOCAB, prompts
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from modeling_speculator.context_vectors import read_text
from modeling_speculator.modeling_eagle import EagleConfig, EagleSpeculator


@pytest.mark.parametrize("make", [eagle_speculator, eagle3_speculator])
@torch.no_grad()
def test_a_path_by_hand(llama, make):
    """Pair after pair through the layer, as in a text that the true features of some tokens begin."""
    speculator, text = make(llama), tokens(12, rows=2)
    drafter, layer = speculator.beside(llama), speculator.speculator.layer
    feature_layers = speculator.speculator.feature_layers
    reading = read_text(llama, text[:, :-1], torch.ones_like(text[:, :-1]), feature_layers)
    starts = drafter.with_context(reading.hidden_states[:, :9], text[:, 1:10], _first(reading.features, 9))
    logits = drafter.score(starts, text[:, 1:])  # (heads, batch, 9, vocab)
    embed = llama.get_input_embeddings()
    for n in (1, 4, 9):  # of true pairs
        features = reading.hidden_states[:, :n] if layer.fc.bias is not None else layer.fc(reading.features[:, :n])
        for head in range(3):
            positions = torch.arange(features.shape[1])[None]
            pairs = layer.pair(features, embed(text[:, 1 : 1 + features.shape[1]]), positions)
            guess = layer.attend(None, *pairs)[:, -1:]
            expected = llama.get_output_embeddings()(layer.norm(guess))
            torch.testing.assert_close(logits[head, :, n - 1 : n], expected, rtol=1e-4, atol=1e-4)
            features = torch.cat([features, guess], dim=1)


def _first(features, n):
    return None if features is None else features[:, :n]


@torch.no_grad()
def test_the_layer_of_eagle_1_is_llamas(llama):
    """Without its first norm, behind a product."""
    speculator, text = eagle_speculator(llama), tokens(9, rows=2)
    layer = speculator.speculator.layer
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, rms_norm_eps=1e-6, attn_implementation="eager"
    )
    theirs = LlamaDecoderLayer(config, 0)
    theirs.input_layernorm = torch.nn.Identity()
    weights = {f"self_attn.{name}_proj.weight": getattr(layer, f"{name}_proj").weight for name in "qkvo"}
    weights |= {f"mlp.{name}_proj.weight": getattr(layer, f"{name}_proj").weight for name in ("gate", "up", "down")}
    theirs.load_state_dict(weights | {"post_attention_layernorm.weight": layer.post_attention_layernorm.weight})
    states = read_text(llama, text[:, :-1], torch.ones_like(text[:, :-1])).hidden_states
    entering = F.linear(
        torch.cat([llama.get_input_embeddings()(text[:, 1:]), states], -1), layer.fc.weight, layer.fc.bias
    )
    angles = LlamaRotaryEmbedding(config)(entering, torch.arange(8)[None])
    mask = torch.full((8, 8), -torch.inf).triu(1)[None, None]
    expected = theirs(entering, attention_mask=mask, position_embeddings=angles)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(speculator.beside(llama).with_context(states, text[:, 1:]), expected)


def test_a_new_one_says_what_enters_its_layer(llama):
    """All that it would add starts at zero."""
    speculator = EagleSpeculator(EagleConfig(vocab_size=VOCAB, emb_dim=32, context_heads=2))
    layer, states = speculator.speculator.layer, torch.randn(1, 4, 32)
    starts = speculator.beside(llama).with_context(states, tokens(4))
    embeddings = llama.get_input_embeddings()(tokens(4))
    torch.testing.assert_close(starts, layer.fc(torch.cat([embeddings, states], dim=-1)))


def test_bad_configs(llama):
    shape = {"vocab_size": VOCAB, "emb_dim": 32}
    with pytest.raises(ValueError, match="can't be split into 3 heads"):
        EagleConfig(**shape, context_heads=3)
    with pytest.raises(ValueError, match="must divide the 4 `context_heads`"):
        EagleConfig(**shape, context_heads=4, context_kv_heads=3)
    with pytest.raises(ValueError, match="drop `tie_weights`"):
        EagleConfig(**shape, tie_weights=True)
    with pytest.raises(ValueError, match="`feature_layers` must be a list of integers"):
        EagleConfig(**shape, feature_layers=[-1])
    speculator = EagleSpeculator(EagleConfig(**shape, context_heads=2, feature_layers=[2]))
    with pytest.raises(ValueError, match="a layer that LlamaForCausalLM does not have"):
        llama.generate(**prompts(), assistant_model=speculator)
    with pytest.raises(ValueError, match="needs `features`"):
        eagle3_speculator(llama)(torch.randn(1, 4, 32), tokens(6), base_model=llama)
    with pytest.raises(ValueError, match="has no use for `features`"):
        eagle_speculator(llama)(torch.randn(1, 4, 32), tokens(6), base_model=llama, features=torch.randn(1, 4, 32))
