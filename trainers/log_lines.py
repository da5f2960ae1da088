"""What a training shows of itself: a bar with the time that is left, a line a log, and all of it in log.jsonl."""

import json
import sys
import time
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from .run_folder import LOG


class LogLines(TrainerCallback):
    """Takes the place of the callbacks that print dictionaries. Only the main process of a training shows anything.

    A log of other kinds than those of `log_line` is in the file only.
    """

    def __init__(self):
        self.training, self.evaluating = None, None  # bars
        self.began, self.first_step, self.has_ended = 0.0, 0, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first_step, self.has_ended = time.perf_counter(), state.global_step, False
        if state.is_world_process_zero:
            began = time.strftime("%Y-%m-%dT%H:%M:%S")
            _append(args, {"began": began, "step": state.global_step, "max_steps": state.max_steps})
            self.training = _bar(args, "training", state.max_steps, "step", initial=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.training is not None:
            self.training.update(state.global_step - self.training.n)

    def on_train_end(self, args, state, control, **kwargs):
        self.has_ended = True
        self.training = _close(self.training)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero and has_length(eval_dataloader):
            if self.evaluating is None:
                self.evaluating = _bar(args, "evaluating", len(eval_dataloader), "batch", leave=False)
            self.evaluating.update()

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluating = _close(self.evaluating)

    def on_predict(self, args, state, control, **kwargs):
        self.evaluating = _close(self.evaluating)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        _append(args, {"step": state.global_step} | logs)
        trained = state.global_step - self.first_step
        seconds = (time.perf_counter() - self.began) / trained if trained > 0 else None
        step = state.global_step
        if self.has_ended and args.load_best_model_at_end and state.best_global_step:
            step = state.best_global_step  # whose weights are loaded since
        line = log_line(logs, step, state, seconds)
        if line is not None:
            tqdm.write(line)
            sys.stdout.flush()  # somebody may watch a file


def log_line(logs: dict, step: int, state: TrainerState, seconds_per_step: float | None = None) -> str | None:
    """A log of a `Trainer` as one line: of steps of a training, of an evaluation, of a training's end; else None."""
    if "loss" in logs:
        parts = [f"step {step}/{state.max_steps}", *_figures(logs, "")]
        if "tokens_per_second" in logs:
            parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
        if seconds_per_step is not None and step < state.max_steps:
            parts.append(f"{in_short((state.max_steps - step) * seconds_per_step)} left")
        return "  ".join(parts)
    if "train_runtime" in logs:
        return f"training ended at step {step} after {in_short(logs['train_runtime'])}"
    name = next((key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")), None)
    if name is None:
        return None
    of = name.removeprefix("eval").strip("_")  # of several sets of data, the name of one
    return f"evaluation{of and f' of {of}'} at step {step}: " + ", ".join(_figures(logs, f"{name}_"))


def _figures(logs: dict, prefix: str) -> list[str]:
    """As far as they are there: loss, accuracy of each head, tokens per step."""
    figures, heads, head = [], [], 1
    if f"{prefix}loss" in logs:
        figures.append(f"loss {logs[f'{prefix}loss']:.3g}")
    while (accuracy := logs.get(f"{prefix}accuracy_head_{head}")) is not None:
        heads.append(f"{100 * accuracy:.0f}")
        head += 1
    if heads:
        figures.append(f"heads {' / '.join(heads)} %")
    if f"{prefix}tokens_per_step" in logs:
        figures.append(f"{logs[f'{prefix}tokens_per_step']:.2f} tokens per step")
    if f"{prefix}tokens_per_step_sampled" in logs:
        figures.append(f"{logs[f'{prefix}tokens_per_step_sampled']:.2f} sampled")
    return figures


def in_short(seconds: float) -> str:
    """A time as a line has room for it: "90 s", "3 min", "2 h 10 min"."""
    minutes = round(seconds / 60)
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _bar(args: TrainingArguments, name: str, total: int, unit: str, **options) -> tqdm:
    return tqdm(desc=name, total=total, unit=unit, disable=args.disable_tqdm, dynamic_ncols=True, **options)


def _close(bar: tqdm | None) -> None:
    """Ends a bar, if there is one; returns what takes its place."""
    if bar is not None:
        bar.close()
    return None


def _append(args: TrainingArguments, record: dict) -> None:
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOG, "a") as file:
        file.write(json.dumps(record, default=str) + "\n")
