"""What a head is trained for: a loss per position, from its logits and what the base model says there.

Everywhere p is the base model's distribution of the token that the head predicts, q the head's. A draft is accepted
with probability alpha = sum_v min(p_v, q_v) (arXiv 2211.17192, section 3.1). All are computed in the dtype they get,
which is float32 in training.
"""

import torch
from torch.nn import functional as F


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log q of the true token, 0 at -100: the published loss (arXiv 2404.19124, section 3).

    Args:
        logits: (positions, vocab).
        labels: (positions,).

    Returns:
        (positions,).
    """
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)


def forward_kl(logits: torch.Tensor, base_logits: torch.Tensor) -> torch.Tensor:
    """KL(p || q), to which a token that p rules out adds nothing: (positions, vocab) twice -> (positions,)."""
    p = base_logits.softmax(-1)
    return (p.xlogy(p) - p * logits.log_softmax(-1)).sum(-1)


def acceptance(logits: torch.Tensor, base_logits: torch.Tensor) -> torch.Tensor:
    """alpha = sum_v min(p_v, q_v): (positions, vocab) twice -> (positions,) between 0 and 1."""
    return torch.minimum(base_logits.softmax(-1), logits.softmax(-1)).sum(-1)


def total_variation(logits: torch.Tensor, base_logits: torch.Tensor) -> torch.Tensor:
    """1 - alpha, the distance of p and q (arXiv 2310.08461, section 3): (positions, vocab) twice -> (positions,)."""
    return 1 - acceptance(logits, base_logits)


def negative_log_acceptance(logits: torch.Tensor, base_logits: torch.Tensor) -> torch.Tensor:
    """-log alpha (arXiv 2602.23881): total variation's gradient over alpha, so that a head far off learns, too.

    Where p is a point mass it is the cross-entropy. (positions, vocab) twice -> (positions,).
    """
    return -acceptance(logits, base_logits).clamp(min=torch.finfo(logits.dtype).tiny).log()


def lk_hybrid(logits: torch.Tensor, base_logits: torch.Tensor) -> torch.Tensor:
    """w KL + (1 - w) TV with w = exp(-3 alpha), a constant to the gradient (arXiv 2602.23881): KL while q is far off.

    (positions, vocab) twice -> (positions,).
    """
    alpha = acceptance(logits, base_logits)
    weight = torch.exp(-3 * alpha.detach())
    return weight * forward_kl(logits, base_logits) + (1 - weight) * (1 - alpha)


# Those on a token: the true one, or the base model's most probable one; and those on the base model's distribution.
TOKEN_LOSSES = {"cross_entropy": cross_entropy}
CHOICE_LOSSES = {"argmax": cross_entropy}
DISTRIBUTION_LOSSES = {
    "forward_kl": forward_kl,
    "total_variation": total_variation,
    "negative_log_acceptance": negative_log_acceptance,
    "lk_hybrid": lk_hybrid,
}
LOSSES = (*TOKEN_LOSSES, *CHOICE_LOSSES, *DISTRIBUTION_LOSSES)


def mixed(
    names: list[str],
    weights: list[float],
    logits: torch.Tensor,
    labels: torch.Tensor,
    base_logits: torch.Tensor | None = None,
    choices: torch.Tensor | None = None,
) -> torch.Tensor:
    """A weighted sum of losses by name: (positions,).

    Args:
        logits, base_logits: (positions, vocab).
        labels, choices: (positions,), the true tokens and the base model's most probable ones; -100 adds nothing.
    """
    total = 0.0
    for name, weight in zip(names, weights, strict=True):
        if name in TOKEN_LOSSES:
            loss = TOKEN_LOSSES[name](logits, labels)
        elif name in CHOICE_LOSSES:
            loss = CHOICE_LOSSES[name](logits, choices)
        else:
            loss = DISTRIBUTION_LOSSES[name](logits, base_logits)
        total = total + weight * loss
    return total
