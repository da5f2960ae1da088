"""What one sees while training: losses and accuracy per head, tokens per second, where the time goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import EvalPrediction

from .objective import ObjectiveOutput


def per_head(name: str, values) -> dict[str, float]:
    """{name_head_1: ..., name_head_2: ...}, heads counted from 1 as in the paper."""
    return {f"{name}_head_{head}": float(value) for head, value in enumerate(values, start=1)}


def head_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Loss and accuracy per head, from the rows that `SpeculatorTrainer.prediction_step` returns."""
    losses, correct, correct_top_k = prediction.predictions
    counted = prediction.label_ids.sum(0).clip(min=1)
    return (
        per_head("accuracy", correct.sum(0) / counted)
        | per_head("accuracy_top_k", correct_top_k.sum(0) / counted)
        | per_head("loss", losses.sum(0) / counted)
    )


class HeadWindow:
    """Sums over the micro-batches since the last log; nothing waits for the device until they are read."""

    def __init__(self):
        self.sums, self.batches = None, 0

    def add(self, outputs: ObjectiveOutput) -> None:
        counts = [outputs.correct, outputs.correct_top_k, outputs.counted]
        sums = torch.stack([outputs.losses.detach(), *(count.sum(0) for count in counts)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.batches += 1

    def is_finite(self) -> bool:
        return self.sums is None or bool(self.sums.isfinite().all())

    def read(self, reduce) -> dict[str, float]:
        """The means since the last time; empty where nothing was added.

        Args:
            reduce: sums a tensor over all processes.
        """
        if self.sums is None:
            return {}
        sums = torch.cat([self.sums, torch.full_like(self.sums[:1], self.batches)])
        losses, correct, correct_top_k, counted, batches = reduce(sums).tolist()
        self.sums, self.batches = None, 0
        return (
            per_head("loss", [loss / n for loss, n in zip(losses, batches, strict=True)])
            | per_head("accuracy", [c / max(n, 1) for c, n in zip(correct, counted, strict=True)])
            | per_head("accuracy_top_k", [c / max(n, 1) for c, n in zip(correct_top_k, counted, strict=True)])
        )


class Stopwatch:
    """Seconds spent in parts of the work, and what was done in them, since the last reading.

    On a GPU they are taken from events in its stream, so that nothing waits for it.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self._start_anew()

    def _start_anew(self) -> None:
        self.started, self.spans, self.tokens = time.perf_counter(), defaultdict(list), defaultdict(int)

    @contextmanager
    def measure(self, part: str, tokens: int = 0) -> Iterator[None]:
        """Adds the time within, and a number of tokens, to a part."""
        start = self._now()
        yield
        self.spans[part].append((start, self._now()))
        self.tokens[part] += tokens

    def _now(self) -> torch.cuda.Event | float:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def rates(self, processes: int) -> dict[str, float]:
        """Tokens per second of all processes, and this one's shares of time, since the last reading."""
        elapsed, seconds, tokens = self.read()
        logs = {"tokens_per_second": sum(tokens.values()) * processes / elapsed}
        if seconds.get("generation"):
            logs["generated_tokens_per_second"] = tokens["generation"] * processes / seconds["generation"]
        shares = {name: spent / elapsed for name, spent in seconds.items()}
        shares["speculator"] = 1 - sum(shares.values())  # and all that is not the base model's
        return logs | {f"share_of_time_{name}": share for name, share in shares.items()}

    def read(self) -> tuple[float, dict[str, float], dict[str, int]]:
        """Seconds since the last reading, and seconds and tokens of each part."""
        if self.on_gpu:
            torch.cuda.synchronize()
            seconds = {name: sum(a.elapsed_time(b) for a, b in spans) / 1000 for name, spans in self.spans.items()}
        else:
            seconds = {name: sum(b - a for a, b in spans) for name, spans in self.spans.items()}
        result = time.perf_counter() - self.started, seconds, dict(self.tokens)
        self._start_anew()
        return result
