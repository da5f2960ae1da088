"""Choosing how much to speculate from what it is found to gain and to cost: `speculation="adaptive"`."""

import time
from collections.abc import Callable
from typing import NamedTuple

from .lookup import lookup_tokens


# Steps of a trial, the first and the last of which are not counted.
_TRIAL = 5
# Steps between two trials of what was not the best so far: few at first, twice as many each time that the best is the
# same as before. Not too many, because acceptance changes with the text, and cost with the load.
_FIRST_PERIOD, _LAST_PERIOD = 8, 64
# A step that took so many times the longest counted one says nothing of what is usual.
_OUTLIER = 10
# How much a step weighs against the one before it: a measure of the last twenty or so.
_DECAY = 0.95


class Choice(NamedTuple):
    """How much is drafted: candidates, and the tokens of a lookup branch beside them; without candidates, nothing."""

    n_candidates: int
    n_lookup_tokens: int = 0


def choices_of(config) -> list[Choice]:
    """What there is to pick from: nothing, a single candidate, and what the dials say, the last two with and without
    the lookup branch."""
    few = [1] if getattr(config, "n_tree_nodes", None) is None else []  # a tree of best nodes has one size
    branches = {lookup_tokens(config), 0 if config.n_predict else lookup_tokens(config)}
    drafts = [Choice(n, branch) for n in (*few, config.n_candidates) if n for branch in branches]
    return sorted({Choice(0), *drafts})


class AdaptiveSpeculation:
    """Picks the choice with the most tokens per second and row.

    First each is tried; then the best is taken, and now and then another one is tried again. The text does not depend
    on what is picked, since neither greedy tokens nor the noise of sampled ones do.

    Args:
        choices: the least ambitious first.
        clock: seconds.
    """

    def __init__(self, choices: list[Choice], clock: Callable[[], float] = time.perf_counter):
        self.clock, self.last, self.longest = clock, None, None
        self.tokens, self.seconds = dict.fromkeys(choices, 0.0), dict.fromkeys(choices, 0.0)
        self.untried = list(reversed(choices))  # the most ambitious first
        self.least_recent = list(self.untried)  # the choices in the order of their last trial
        self.current, self.steps_left, self.on_trial = None, 0, True
        self.best, self.period = None, _FIRST_PERIOD

    def choose(self) -> Choice:
        """How much to draft for the next step."""
        if self.steps_left == 0:
            best = max(self.seconds, key=self.rate)
            if self.untried:
                self.try_out(self.untried.pop(0))
            elif self.on_trial or len(self.seconds) == 1:
                self.period = min(2 * self.period, _LAST_PERIOD) if best == self.best else _FIRST_PERIOD
                self.current = self.best = best
                self.steps_left, self.on_trial = self.period, False
            else:
                self.try_out(next(choice for choice in self.least_recent if choice != best))
        self.steps_left -= 1
        return self.current

    def try_out(self, choice: Choice) -> None:
        self.current, self.steps_left, self.on_trial = choice, _TRIAL, True
        self.least_recent.remove(choice)
        self.least_recent.append(choice)

    def rate(self, choice: Choice) -> float:
        """Tokens per second and row."""
        return self.tokens[choice] / max(self.seconds[choice], 1e-9)

    def record(self, choice: Choice, tokens_per_row: float) -> None:
        """Counts a step that has just ended, if it was like its neighbours.

        Not one with another choice before or after it: the draft of one of the two is in its time. Nor one that took
        far longer than any: it waited for a compilation, or for another program.
        """
        now, last = self.clock(), self.last
        self.last = choice, now
        if last is None or last[0] != choice or self.current != choice:
            return
        seconds = now - last[1]
        if self.longest is not None and seconds > _OUTLIER * self.longest:
            return
        self.longest = seconds if self.longest is None else max(seconds, self.longest)
        self.tokens[choice] = _DECAY * self.tokens[choice] + tokens_per_row
        self.seconds[choice] = _DECAY * self.seconds[choice] + seconds
