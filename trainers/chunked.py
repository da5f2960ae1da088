"""An LM head and what is computed from its logits, a few positions at a time.

The logits of all positions and heads would be the largest tensors of training by far: 8 x 4096 positions, 128,256
tokens and 4 heads are 67 GB in float32. Here a chunk's logits are made, used and dropped.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


CHUNK_ELEMENTS = 2**27  # logits at a time: 512 MB in float32, enough to keep a GPU's matrix units busy

# From a chunk's logits (positions, vocab), in float32, and where the chunk lies: a sum of losses, and what else is
# wanted of each position, (positions, values), without a gradient.
Score = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]


def chunked_linear(
    head: nn.Module, features: torch.Tensor, score: Score, chunk_elements: int = CHUNK_ELEMENTS
) -> tuple[torch.Tensor, torch.Tensor]:
    """`score(head(features))`, chunk after chunk, with gradients in `features` and the head's weights.

    Args:
        head: of `vocab` outputs.
        features: (positions, inner_dim).

    Returns:
        The sum of the losses, a scalar, and the values of all positions, (positions, values).
    """
    rows = max(1, chunk_elements // head.out_features)
    chunks = [slice(at, at + rows) for at in range(0, len(features), rows)]
    # A plain weight that lies here whole is multiplied in place of calling the head: not one with an adapter, nor one
    # that FSDP or ZeRO-3 (which marks it with `ds_id`) gathers when the head is called.
    if type(head) is nn.Linear and not isinstance(head.weight, DTensor) and not hasattr(head.weight, "ds_id"):
        loss, *values = _LinearScore.apply(features, head.weight, score, chunks, torch.is_grad_enabled())
    else:
        losses, values = [], []
        for at in chunks:
            loss, value = checkpoint(_call_and_score, head, features[at], score, at, use_reentrant=False)
            losses.append(loss)
            values.append(value)
        loss = torch.stack(losses).sum()
    return loss, torch.cat(values)


def _call_and_score(head: nn.Module, features: torch.Tensor, score: Score, at: slice):
    return score(head(features).float(), at)


class _LinearScore(torch.autograd.Function):
    """Takes the gradient of a chunk's logits while they are there, so that backward need not make them again.

    (The idea of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989, for any loss.) Compared with torch 2.13's
    `linear_cross_entropy`: recipes/benchmark_loss.py.
    """

    @staticmethod
    def forward(ctx, features, weight, score, chunks, needs_gradient):
        device = features.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        ctx.dtypes = features.dtype, weight.dtype
        weight_here, features = weight.to(dtype), features.to(dtype)
        grad_features = torch.empty_like(features) if needs_gradient and ctx.needs_input_grad[0] else None
        # In float32: a sum over chunks, which half precision would round each time.
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if needs_gradient and ctx.needs_input_grad[1] else None
        )
        total, values = torch.zeros((), device=features.device), []
        with torch.autocast(device, enabled=False):
            for at in chunks:
                logits = F.linear(features[at], weight_here).float()
                with torch.set_grad_enabled(needs_gradient):
                    loss, value = score(logits.requires_grad_(needs_gradient), at)
                total += loss.detach()
                values.append(value.detach())
                if not needs_gradient:
                    continue
                (gradient,) = torch.autograd.grad(loss, logits)
                gradient = gradient.to(dtype)
                if grad_features is not None:
                    torch.mm(gradient, weight_here, out=grad_features[at])
                if grad_weight is not None:
                    grad_weight += gradient.T @ features[at]
        ctx.save_for_backward(grad_features, grad_weight)
        ctx.mark_non_differentiable(*values)
        return total, *values

    @staticmethod
    def backward(ctx, grad_total, *_):
        # In place, for the largest tensors that are left; autograd then refuses a second backward.
        gradients = [
            None if gradient is None else gradient.mul_(grad_total).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None
