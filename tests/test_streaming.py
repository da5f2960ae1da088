"""Speculative Streaming: streams beside the nodes of a step, and along a text."""

import pytest
import torch
from drafters import streaming_speculator
from test_drafter_state import SAME, farthest, speculate
from tiny_models import prompts, tiny_model

from modeling_speculator import streams
from modeling_speculator.context_vectors import read_text


@pytest.mark.parametrize("n_stream_layers", [1, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_one_layer_or_all(family, attention, n_stream_layers):
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    oracle, out = speculate(model, streaming_speculator(model, n_stream_layers=n_stream_layers), prompts())
    assert farthest(oracle, out) < SAME


def test_a_long_text_in_parts(llama, monkeypatch):
    """Of some places at a time, computed again for the backward where that would be large: the same, gradients too."""
    text, results = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0)), []
    reading = read_text(llama, text[:, :-1], torch.ones_like(text[:, :-1]), [1])
    segments = torch.tensor([[1] * 20 + [2] * 19, [0] * 5 + [1] * 34])
    for rows, kept in ((1000, 2**32), (9, 2**32), (9, 0)):
        monkeypatch.setattr(streams, "LEAST_ROWS", rows)
        monkeypatch.setattr(streams, "KEPT_BYTES", kept)
        speculator = streaming_speculator(llama)
        starts = speculator.beside(llama).with_context(reading.hidden_states, text[:, 1:], reading.features, segments)
        starts.square().sum().backward()
        results.append([starts, *(weight.grad for weight in speculator.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)
    assert all(weight.grad is None for weight in llama.parameters())
