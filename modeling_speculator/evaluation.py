"""Measuring speculation: same text, how many tokens per step, how fast."""

import math
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib import metadata
from pathlib import Path

import torch

from .statistics import SpeculationStatistics


@dataclass(frozen=True)
class PromptOutcome:
    """One prompt, continued greedily with and without the speculator.

    prompt: token ids.
    continuation: token ids that the loop emitted with the speculator.
    identical: whether plain `generate` emits the same.
    distinct_4grams: of the continuation; a text that loops has few, and flatters every drafter.
    """

    prompt: list[int]
    continuation: list[int]
    identical: bool
    distinct_4grams: float
    speculation: SpeculationStatistics


def compare_outputs(model, speculator, prompts: Iterable[torch.Tensor], max_new_tokens: int) -> list[PromptOutcome]:
    """Continues each prompt (1, length) greedily, plainly and with the speculator."""
    outcomes = []
    for prompt in prompts:
        plain = generate_greedily(model, prompt, max_new_tokens)
        out = generate_greedily(
            model, prompt, max_new_tokens, assistant_model=speculator, return_dict_in_generate=True
        )
        continuation = out.sequences[0, prompt.shape[1] :].tolist()
        outcomes.append(
            PromptOutcome(
                prompt=prompt[0].tolist(),
                continuation=continuation,
                identical=plain.tolist() == out.sequences.tolist(),
                distinct_4grams=distinct_ngrams(continuation, 4),
                speculation=out.speculation,
            )
        )
    return outcomes


def generate_greedily(model, prompt: torch.Tensor, max_new_tokens: int, **kwargs):
    """`model.generate` of one unpadded prompt (1, length), whatever sampling its generation config asks for."""
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, do_sample=False, **kwargs
    )


def distinct_ngrams(tokens: Sequence[int], n: int) -> float:
    """Distinct n-grams over all n-grams: 1 where none repeats; 1 for a text too short to have any."""
    ngrams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


@torch.no_grad()
def accepted_drafts(
    speculator, hidden_states: torch.Tensor, tokens: torch.Tensor, chunk_elements: int = 2**27
) -> torch.Tensor:
    """How many drafted tokens would be accepted at each position of a text that the base model wrote.

    Args:
        speculator: drafts by its dials.
        hidden_states: (batch, length, emb_dim), the context vectors that the tokens were drawn from.
        tokens: (batch, length); -100 where nothing can be accepted, as after an end of text.
        chunk_elements: logits of the widest level of the trees that are drafted at once.

    Returns:
        (batch, length - n_predict) integers between 0 and `n_predict`.
    """
    config = speculator.config
    n = tokens.shape[1] - config.n_predict
    if config.n_candidates == 0 and config.n_tree_nodes is None:  # no speculation
        return torch.zeros_like(tokens[:, :n])
    chunk_size = max(1, chunk_elements // (config.vocab_size * math.prod(config.top_k_tokens_per_head[:-1])))
    roots = tokens[:, :n].clamp(min=0).reshape(-1, 1)
    truth = tokens[:, 1:].unfold(1, config.n_predict, 1).flatten(0, 1)  # (batch * n, n_predict)
    states = hidden_states[:, :n].flatten(0, 1)[:, None]
    parts = []
    for at in range(0, len(roots), chunk_size):
        here = slice(at, at + chunk_size)
        if config.n_tree_nodes is None:
            candidates = speculator.generate_candidates(states[here], roots[here])
            parts.append((candidates == truth[here, None]).cumprod(-1).sum(-1).amax(-1))
        else:
            drafted, parents, depths = speculator.generate_tree(states[here], roots[here])
            right = drafted == truth[here].gather(1, depths - 1)
            for _ in range(config.n_predict - 1):  # ... and so must be all of its ancestors
                right &= torch.nn.functional.pad(right, (1, 0), value=True).gather(1, parents)
            parts.append((right * depths).amax(-1))
    return torch.cat(parts).view(len(tokens), n)


def simulate_steps(accepted: torch.Tensor, lengths: torch.Tensor) -> tuple[int, int]:
    """The steps that speculation would have taken over texts, and the tokens that they would have emitted.

    Exact where the base model wrote the texts by the rule (greedy, or sampled) that the speculation would verify by.

    Args:
        accepted: (batch, n), of `accepted_drafts`.
        lengths: (batch,), tokens of each text up to its end; the first one is the prefill's.
    """
    rows, n = torch.arange(len(accepted), device=accepted.device), accepted.shape[1]
    at, steps, tokens = torch.zeros_like(lengths), torch.zeros_like(lengths), torch.zeros_like(lengths)
    for _ in range(n):
        goes_on = at < (lengths - 1).clamp(max=n)
        emitted = torch.minimum(accepted[rows, at.clamp(max=n - 1)] + 1, lengths - 1 - at) * goes_on
        at, steps, tokens = at + emitted, steps + goes_on, tokens + emitted
    return int(steps.sum()), int(tokens.sum())


def time_in_turn(runs: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Times runs that each return a number of tokens, A B A B, after one untimed round.

    In turn, because a machine's speed drifts by more than what is compared.

    Returns:
        Tokens per second of each run in each round.
    """
    rates = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            tokens = run()
            synchronize()
            if round_ > 0:
                rates[name].append(tokens / (time.perf_counter() - start))
    return rates


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
        with ExitStack() as stack:
            stack.enter_context(_timed(model, "forward", spent))
            for name in drafts:
                stack.enter_context(_timed(speculator, name, spent))
            start = time.perf_counter()
            steps = run().steps
            total = time.perf_counter() - start - spent["first forward"]
        parts = (total, sum(spent[name] for name in drafts), spent["forward"])
        rows.append([1000 * seconds / max(1, steps) for seconds in parts])
    step, draft, verify = (statistics.median(column) for column in zip(*rows, strict=True))
    return {"step_ms": step, "draft_ms": draft, "verify_ms": verify, "overhead": step / (draft + verify)}


@contextmanager
def _timed(module, name: str, spent: Counter):
    """Adds up the seconds in a method of a module; the first call, of the prefill, is kept apart."""
    original = getattr(module, name)

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
        delattr(module, name)


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


def versions() -> dict[str, str]:
    """What a figure was measured with."""
    names = ("modeling-speculator", "torch", "transformers")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def machine() -> dict[str, str | int]:
    """What a figure was measured on, and when."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    processor = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return gpu | {"processor": processor, "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
