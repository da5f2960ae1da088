"""What training reports per head."""

import torch
from transformers import EvalPrediction


def correct_per_head(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each head's most probable token is the true one.

    Args:
        logits: (n_predict, batch, n, vocab).
        labels: (batch, n + n_predict - 1), aligned as in the speculator's forward; -100 is not counted.

    Returns:
        Two (batch, n_predict) integer tensors: correct predictions and counted positions.
    """
    n_predict, _, n, _ = logits.shape
    targets = torch.stack([labels[:, head : head + n] for head in range(n_predict)])  # (n_predict, batch, n)
    correct = (logits.argmax(-1) == targets).sum(-1)
    return correct.T, (targets != -100).sum(-1).T


def per_head(name: str, values) -> dict[str, float]:
    """{name_head_1: ..., name_head_2: ...}, heads counted from 1 as in the paper."""
    return {f"{name}_head_{head}": float(value) for head, value in enumerate(values, start=1)}


def head_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Loss and accuracy per head, from the rows that `SpeculatorTrainer.prediction_step` returns."""
    correct, losses = prediction.predictions
    counted = prediction.label_ids
    return per_head("accuracy", correct.sum(0) / counted.sum(0).clip(min=1)) | per_head("loss", losses.mean(0))
