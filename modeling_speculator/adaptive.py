"""Choosing how much to speculate from what it is found to gain and to cost: `speculation="adaptive"`."""

import time
from collections.abc import Callable


# Steps of a trial, the first and the last of which are not counted.
_TRIAL = 5
# Steps between two trials of what was not the best so far: few at first, twice as many each time that the best is the
# same as before. Not too many, because acceptance changes with the text, and cost with the load.
_FIRST_PERIOD, _LAST_PERIOD = 8, 64
# A step that took so many times the longest counted one says nothing of what is usual.
_OUTLIER = 10
# How much a step weighs against the one before it: a measure of the last twenty or so.
_DECAY = 0.95


def choices_of(config) -> list[int]:
    """What there is to pick from: nothing, a single candidate, and what the dials say."""
    few = [1] if getattr(config, "n_tree_nodes", None) is None else []  # a tree of best nodes has one size
    return sorted({0, *few, config.n_candidates})


class AdaptiveSpeculation:
    """Picks the number of candidates with the most tokens per second and row.

    First each choice is tried; then the best is taken, and now and then another one is tried again. The text does not
    depend on what is picked, since neither greedy tokens nor the noise of sampled ones do.

    Args:
        choices: numbers of candidates; 0 is plain decoding.
        clock: seconds.
    """

    def __init__(self, choices: list[int], clock: Callable[[], float] = time.perf_counter):
        self.clock, self.last, self.longest = clock, None, None
        self.tokens, self.seconds = dict.fromkeys(choices, 0.0), dict.fromkeys(choices, 0.0)
        self.untried = sorted(choices, reverse=True)  # the most ambitious first
        self.least_recent = list(self.untried)  # the choices in the order of their last trial
        self.current, self.steps_left, self.on_trial = None, 0, True
        self.best, self.period = None, _FIRST_PERIOD

    def choose(self) -> int:
        """How many candidates the next step shall have."""
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

    def try_out(self, choice: int) -> None:
        self.current, self.steps_left, self.on_trial = choice, _TRIAL, True
        self.least_recent.remove(choice)
        self.least_recent.append(choice)

    def rate(self, choice: int) -> float:
        """Tokens per second and row."""
        return self.tokens[choice] / max(self.seconds[choice], 1e-9)

    def record(self, choice: int, tokens_per_row: float) -> None:
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
