"""The learning-rate schedule of the published recipe."""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def parabolic_cosine_schedule(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Parabolic warm-up to the optimizer's rate, then a cosine to a tenth of it (foundation-model-stack/fms-fsdp)."""
    return LambdaLR(optimizer, partial(_factor, warmup=num_warmup_steps, total=num_training_steps))


def _factor(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return 1 - (1 - step / warmup) ** 2
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
