"""Latency of ways to decode, side by side: time to the first token and per token, tokens per step, memory."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from ..drafters import turned
from ..transformers_api import forget_static_cache
from .benchmarking import synchronize
from .evaluation import distinct_ngrams, loops
from .methods import Method


BETWEEN = 3  # runs of others between two of plain `generate`, to which they are compared: the machine's speed drifts

Batches = list[tuple[torch.Tensor, torch.Tensor]]  # input_ids and attention_mask, (batch, length)


def measure_latency(model, methods: list[Method], batches: Batches, new_tokens: int, rounds: int) -> list[dict]:
    """Times methods on the same prompts, in turn, each after one untimed run.

    Plain `generate` is timed anew before and after every few others, which are compared with what it would have taken
    in between: where the machine's speed drifts within a round, it drifts for both. All generate `new_tokens` tokens a
    row, past an end of text, too. A method that fails has its error in its row.

    Args:
        methods: of `expand_methods`; plain `generate`, which the others are compared with, among them.

    Returns:
        A row a method: medians over the rounds, and their spread; how many of the texts loop, which flatters every
        drafter.
    """
    runs = [_Runs(model, method, batches, new_tokens) for method in methods]
    forget_static_cache(model)
    for run in tqdm(runs, desc="warm-up", leave=False):
        run.attempt(run.warm_up)
    plain = next((run for run in runs if run.method.name == "generate"), None)
    others = [run for run in runs if run is not plain]
    groups = [others[first : first + BETWEEN] for first in range(0, max(1, len(others)), BETWEEN)]
    with tqdm(total=rounds * (len(others) + len(groups) + 1), desc="timing", unit="run", leave=False) as progress:
        for _ in range(rounds):
            for group in groups:
                _time(plain, progress)
                for number, run in enumerate(group, start=1):
                    run.among_plain.append((len(plain.whole) - 1 if plain else 0, number / (len(group) + 1)))
                    _time(run, progress)
            _time(plain, progress)
    return [run.row(plain) for run in runs]


def _time(run: "_Runs | None", progress: tqdm) -> None:
    if run is not None:
        run.attempt(run.time)
    progress.update()


class _Runs:
    """What one method has done so far."""

    def __init__(self, model, method: Method, batches: Batches, new_tokens: int):
        self.model, self.method, self.batches, self.new_tokens = model, method, batches, new_tokens
        self.problem = {} if method.reason is None else {"skipped": method.reason}
        self.first, self.whole, self.figures = [], [], {}
        self.among_plain = []  # of each timed run: after which run of plain `generate`, and how far to the next

    def attempt(self, run: Callable[[], None]) -> None:
        """Does what has not failed so far."""
        if self.problem:
            return
        try:
            run()
        except Exception as error:  # the others go on
            self.problem = {"error": f"{type(error).__name__}: {error}"}

    def warm_up(self) -> None:
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        if before:
            torch.cuda.reset_peak_memory_stats()
        outputs, clocks = self.generate(self.new_tokens)
        if before:  # of keys, values and activations: weights of all methods are there all the time
            self.figures["gib_beside_weights"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        self.generate(1)
        self.texts = torch.cat([out.sequences for out in outputs])
        if self.method.drafter is not None:
            steps = sum(out.speculation.steps for out in outputs)
            tokens = sum(out.speculation.tokens for out in outputs)
        elif self.method.is_stock:
            steps = sum(len(clock.emitted) - 1 for clock in clocks)
            tokens = sum(sum(clock.emitted[1:]) for clock in clocks)
        else:
            steps = tokens = 1
        self.figures["tokens_per_step"] = tokens / steps if steps else None

    def time(self) -> None:
        """Seconds of a run, and until its first tokens were there, summed over batches."""
        synchronize()
        start = time.perf_counter()
        _, clocks = self.generate(self.new_tokens)
        synchronize()
        self.whole.append(time.perf_counter() - start)
        if self.method.is_stock:  # with one new token to make it would not draft at all
            self.first.append(sum(clock.until_first for clock in clocks))
            self.left = sum(sum(clock.emitted[1:]) for clock in clocks)
            return
        start = time.perf_counter()
        self.generate(1)
        synchronize()
        self.first.append(time.perf_counter() - start)
        self.left = (self.new_tokens - 1) * len(self.batches)

    def generate(self, new_tokens: int) -> tuple[list, list["_Clock"]]:
        """One run over all batches: the outputs of `generate`, and of transformers' assisted generation its steps."""
        method, outputs, clocks = self.method, [], []
        options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        if "cache_implementation" in method.options:  # of one size, so that nothing is compiled twice
            options["max_cache_len"] = max(ids.shape[1] for ids, _ in self.batches) + self.new_tokens
        with turned(method.drafter, method.dials) if method.drafter is not None else nullcontext():
            for ids, mask in self.batches:
                if method.is_stock:
                    clocks.append(_Clock())
                    options["streamer"] = clocks[-1]
                outputs.append(
                    self.model.generate(
                        ids, attention_mask=mask, return_dict_in_generate=True, **options | method.options
                    )
                )
        return outputs, clocks

    def row(self, plain: "_Runs | None") -> dict:
        row = {"method": self.method.name} | self.method.dials | self.problem
        if self.problem:
            return row
        n_rows = len(self.texts)
        written = self.texts[:, -self.new_tokens :].tolist()
        rates = [n_rows * self.new_tokens / seconds for seconds in self.whole]
        after = [1000 * (whole - first) for whole, first in zip(self.whole, self.first, strict=True)]
        row |= self.figures | {
            "tokens_per_second": statistics.median(rates),
            "tokens_per_second_range": [min(rates), max(rates)],
            "first_token_ms": 1000 * statistics.median(self.first) / len(self.batches),
            "ms_per_token": statistics.median(after) / max(1, self.left),
            "looping": sum(map(loops, written)),
            "distinct_4grams": statistics.median(distinct_ngrams(text, 4) for text in written),
        }
        if plain is not None and not plain.problem:
            row |= {
                "speedup": statistics.median(self._speedups(plain.whole)),
                "identical_outputs": int((plain.texts == self.texts).all(-1).sum()),
                "outputs": n_rows,
            }
        return row

    def _speedups(self, plain: list[float]) -> list[float]:
        """Over what plain `generate` would have taken at the time of each run; 1 for itself."""
        pairs = zip(self.among_plain, self.whole, strict=True) if self.among_plain else []
        return [((1 - share) * plain[at] + share * plain[at + 1]) / own for (at, share), own in pairs] or [1.0]


class _Clock(BaseStreamer):
    """When the first tokens after the prompt came, and how many at a time."""

    def __init__(self):
        self.start, self.until_first, self.emitted = time.perf_counter(), None, None

    def put(self, value: torch.Tensor) -> None:
        if self.emitted is None:  # the prompt
            self.emitted = []
            return
        if not self.emitted:
            self.until_first = time.perf_counter() - self.start
        self.emitted.append(value.numel())

    def end(self) -> None:
        pass
