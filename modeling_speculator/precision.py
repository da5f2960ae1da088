"""Which dtype is fast on this machine: measured, because processors differ twentyfold and their names don't tell."""

import json
import time
from functools import partial
from pathlib import Path

import torch
from transformers.utils import is_torch_bf16_gpu_available


PRECISIONS = ("fast", "float32", "bfloat16")
CPU_SHAPE = (1024, 256, 512)  # tokens, inputs and outputs of a linear layer, as in the quickstart
GPU_SHAPE = (4096, 4096, 4096)  # as in large models: a small product takes as long in any dtype there
SECONDS = 0.05  # of products in each dtype, of which the fastest counts; one at least
# What a product in bfloat16 must gain: around it, weights are cast at each step, and the rest is not faster.
WORTH_CASTING = 1.5


def resolve_precision(precision: str, device: str | torch.device | None = None) -> str:
    """The name of the dtype that a precision is on this machine.

    Args:
        precision: "fast" is measured, in a second at most; "float32" and "bfloat16" are what they are.
        device: where to measure; None: on the GPU, if there is one.

    Raises:
        ValueError: for any other.
    """
    check_precision(precision)
    return str(fast_dtype(device)).removeprefix("torch.") if precision == "fast" else precision


def go_on_in(begun: str | None, precision: str) -> str:
    """`resolve_precision` for work that may have begun, perhaps on another machine: it keeps what it began in.

    Raises:
        ValueError: for another precision than that.
    """
    if begun is None:
        return resolve_precision(precision)
    if precision not in ("fast", begun):
        raise ValueError(f"This was begun in {begun}, not {precision}: go on in that, or take another output folder.")
    return begun


def keep_precision(folder: Path, precision: str) -> str:
    """`go_on_in` for work whose results lie in a folder, where it writes down what it began in."""
    file = folder / "precision.json"
    chosen = go_on_in(json.loads(file.read_text()) if file.is_file() else None, precision)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(chosen) + "\n")
    return chosen


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, but is {precision!r}.")


def fast_dtype(device: str | torch.device | None = None) -> torch.dtype:
    """float32 or bfloat16, whichever a model is trained faster in; near equality float32, which is exact."""
    return faster_of(measure_products(device))


def faster_of(products: dict[torch.dtype, float]) -> torch.dtype:
    """bfloat16 where its rate in `measure_products` is worth the casts, else float32."""
    is_worth_it = products.get(torch.bfloat16, 0) >= WORTH_CASTING * products[torch.float32]
    return torch.bfloat16 if is_worth_it else torch.float32


@torch.no_grad()
def measure_products(device: str | torch.device | None = None) -> dict[torch.dtype, float]:
    """FLOP/s of a linear layer's product in float32 and, where the device has it, in bfloat16.

    The best of several after a warm-up, with the threads that are set: what else the machine does makes some of them
    slow.

    Args:
        device: None: the GPU, if there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    is_cpu = torch.device(device).type == "cpu"
    wait = (lambda: None) if is_cpu else partial(torch.accelerator.synchronize, device)
    tokens, inputs, outputs = CPU_SHAPE if is_cpu else GPU_SHAPE
    dtypes = [torch.float32] + ([torch.bfloat16] if is_cpu or is_torch_bf16_gpu_available() else [])
    rates = {}
    for dtype in dtypes:
        states = torch.ones(tokens, inputs, dtype=dtype, device=device)
        weight = torch.ones(outputs, inputs, dtype=dtype, device=device)
        torch.nn.functional.linear(states, weight)
        times = []
        while not times or sum(times) < SECONDS:
            wait()
            start = time.perf_counter()
            torch.nn.functional.linear(states, weight)
            wait()
            times.append(time.perf_counter() - start)
        rates[dtype] = 2 * tokens * inputs * outputs / min(times)
    return rates
