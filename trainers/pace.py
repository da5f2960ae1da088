"""How fast a training is on this machine: what a step takes, how many fit into some minutes, when to save."""

import statistics
from itertools import pairwise
from time import perf_counter

from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ..measuring.benchmarking import synchronize
from .log_lines import LogLines


ENOUGH = 5.0  # seconds of steps to measure


class TimedSaves(TrainerCallback):
    """Saves, too, when so many minutes have passed since the last save, so that an interruption costs no more.

    The processes of a training agree on it: they save together. With `save_strategy: no` nothing is saved.
    """

    def __init__(self, minutes: float):
        self.seconds, self.saved = 60 * minutes, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.saved = perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self.saved = perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        is_time = [perf_counter() - self.saved >= self.seconds]
        if args.world_size > 1:
            broadcast_object_list(is_time)  # the main process's
        control.should_save |= is_time[0] and args.save_strategy != SaveStrategy.NO


class _Steps(TrainerCallback):
    """When each step ended; it ends the training once they took long enough to tell."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.ends.append(perf_counter())
        control.should_training_stop |= len(self.ends) > 2 and self.ends[-1] - self.ends[0] > ENOUGH


def seconds_per_step(trainer: Trainer) -> float:
    """What a step of a training takes here: the median of some, the first one left out.

    Args:
        trainer: one made for this, with a model and a folder of its own: it trains `max_steps` (3 at least), or fewer
            where they are slow.
    """
    steps = _Steps()
    trainer.add_callback(steps)
    trainer.remove_callback(LogLines)  # it is no training that anybody asked for
    trainer.train()
    return statistics.median(end - start for start, end in pairwise(steps.ends))


def steps_within(minutes: float, seconds_per_step: float, at_most: int) -> int:
    """How many steps of a training fit into some minutes; one at least, and no more than `at_most`."""
    return max(1, min(at_most, int(60 * minutes / seconds_per_step)))


def spoken(seconds: float) -> str:
    """A time as one says it: "about 40 seconds", "about 6 minutes"."""
    if seconds < 57.5:
        return f"about {max(5, 5 * round(seconds / 5))} seconds"
    minutes = round(seconds / 60)
    return f"about {minutes} minutes" if minutes > 1 else "about a minute"
