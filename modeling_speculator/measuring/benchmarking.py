"""Timing runs side by side, and what a figure was measured on and with."""

import hashlib
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import metadata
from pathlib import Path

import psutil
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..candidates import CandidateSelection
from ..statistics import SpeculationStatistics


def time_in_turn(runs: dict[str, Callable[[], int]], rounds: int, desc: str = "timing") -> dict[str, list[float]]:
    """Times runs that each return a number of tokens, A B A B, after one untimed round.

    In turn, because a machine's speed drifts by more than what is compared.

    Args:
        desc: the name of the bar that shows how far it is.

    Returns:
        Tokens per second of each run in each round.
    """
    tokens = {name: run() for name, run in tqdm(runs.items(), desc=f"{desc}, a first round", leave=False)}
    seconds = seconds_in_turn(runs, rounds, desc)
    return {name: [tokens[name] / each for each in seconds[name]] for name in runs}


def seconds_in_turn(runs: dict[str, Callable], rounds: int, desc: str = "timing") -> dict[str, list[float]]:
    """Times runs, A B A B: seconds of each run in each round."""
    seconds = {name: [] for name in runs}
    for name, run in tqdm([*runs.items()] * rounds, desc=desc, unit="run", leave=False):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        seconds[name].append(time.perf_counter() - start)
    return seconds


def speedup(rates: dict[str, list[float]], of: str, over: str) -> float:
    """Median over the rounds of the ratio of two runs of `time_in_turn`."""
    return statistics.median(a / b for a, b in zip(rates[of], rates[over], strict=True))


def step_times(model, speculator, run: Callable[[], SpeculationStatistics], repeats: int = 5) -> dict[str, float]:
    """Where the time of an uncompiled step goes: milliseconds, medians over some runs, the prefill not counted.

    Args:
        run: generates once; `model` and `speculator` are what it uses.

    Returns:
        step_ms, of which draft_ms is the speculator's and verify_ms the base model's forward, and `overhead`: the step
        over these two.
    """
    rows = []
    for _ in range(repeats):
        spent = Counter()
        drafts = [name for name in ("generate_candidates", "generate_tree") if hasattr(speculator, name)]
        # Of heads that are bound to the base model in each call another object drafts, of this class.
        drafter = CandidateSelection if isinstance(speculator, CandidateSelection) else speculator
        with ExitStack() as stack:
            stack.enter_context(_timed(model, "forward", spent))
            for name in drafts:
                stack.enter_context(_timed(drafter, name, spent))
            start = time.perf_counter()
            steps = run().steps
            total = time.perf_counter() - start - spent["first forward"]
        parts = (total, sum(spent[name] for name in drafts), spent["forward"])
        rows.append([1000 * seconds / max(1, steps) for seconds in parts])
    step, draft, verify = (statistics.median(column) for column in zip(*rows, strict=True))
    return {"step_ms": step, "draft_ms": draft, "verify_ms": verify, "overhead": step / (draft + verify)}


@contextmanager
def _timed(module, name: str, spent: Counter):
    """Adds up the seconds in a method of a module or class; the first forward, of the prefill, is kept apart."""
    original, own = getattr(module, name), vars(module).get(name)

    @wraps(original)  # `generate` looks at the signature
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = original(*args, **kwargs)
        synchronize()
        key = "first forward" if name == "forward" and "first forward" not in spent else name
        spent[key] += time.perf_counter() - start
        return result

    setattr(module, name, wrapper)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a device's memory reads and writes, from the best of several large copies."""
    source = torch.empty(2**31 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(10):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.numel() / min(times)


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def warn_of_other_work() -> float:
    """Says so where other processes are at work on a machine that is to be timed; the cores that they take."""
    busy = psutil.cpu_percent(interval=1.0) / 100 * psutil.cpu_count()
    if busy > 0.2:
        print(f"WARNING: {busy:.1f} cores are busy with something else. Stop it: its share of the time is not known.")
    return busy


def versions() -> dict[str, str]:
    """What a figure was measured with."""
    names = ("modeling-speculator", "torch", "transformers")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def machine(with_date: bool = True) -> dict[str, str | int]:
    """What a figure was measured on, and when."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    processor = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    date = {"date": time.strftime("%Y-%m-%d")} if with_date else {}
    return gpu | {"processor": processor, "threads": torch.get_num_threads()} | date


def machine_name(machine: dict) -> str:
    """What `machine` found, in a few words: the GPU, or the CPU and its threads."""
    threads = machine["threads"]
    return machine.get("gpu") or f"{machine['processor'] or 'CPU'}, {threads} thread{'s' if threads > 1 else ''}"


def digest(model: PreTrainedModel) -> str:
    """Of names, shapes, dtypes and the first numbers of a model's weights, to tell others apart; of whole weights.

    It ends in "-partly" where some weights are elsewhere (offloaded): such a one equals only its like.
    """
    found, is_whole = hashlib.sha256(), True
    for name, weight in (
        model.named_parameters() if isinstance(model, torch.nn.Module) else ()
    ):  # prompt lookup has none
        first = weight.detach().flatten()[:16].float().tolist() if weight.device.type != "meta" else []
        is_whole &= bool(first)
        found.update(json.dumps([name, list(weight.shape), str(weight.dtype), first]).encode())
    return found.hexdigest()[:16] + ("" if is_whole else "-partly")
