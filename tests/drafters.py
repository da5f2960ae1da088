"""Drafters whose guesses are known, to stand in for a speculator."""

import torch

from modeling_speculator.measuring.oracle import Oracle


def oracle_for(model, inputs, text, **options):
    """An oracle for what a model makes of the inputs that `tiny_models.prompts` returns."""
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, text.shape[1] - 9), value=1)
    return Oracle(model, text, mask, **{"p_right": 0.7} | options)
