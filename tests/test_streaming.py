"""Speculative Streaming: streams beside the nodes of a step, and along a text."""

import pytest
import torch
from drafters import streaming_speculator
from test_context import SAME, farthest, speculate
from tiny_models import prompts, tiny_model


def test_the_same_as_in_one_pass(family):
    """In a batch with padding, whose rows accept differently."""
    model = tiny_model(family)
    oracle, out = speculate(model, streaming_speculator(model), prompts())
    assert farthest(oracle, out) < SAME
    assert out.speculation.tokens_per_step > 1.3
    assert len({row.steps for row in out.speculation.per_sequence}) > 1
