"""Speculative Streaming: streams beside the nodes of a step, and along a text."""

import pytest
from drafters import streaming_speculator
from test_drafter_state import SAME, farthest, speculate
from tiny_models import prompts, tiny_model


@pytest.mark.parametrize("n_stream_layers", [1, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_one_layer_or_all(family, attention, n_stream_layers):
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    oracle, out = speculate(model, streaming_speculator(model, n_stream_layers=n_stream_layers), prompts())
    assert farthest(oracle, out) < SAME
