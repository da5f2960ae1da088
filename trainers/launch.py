"""What the processes of one launch do together: the main one does it, and all of them know what came of it."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


Result = TypeVar("Result")


def in_main_process(work: Callable[[], Result]) -> Result:
    """What a function returns, or raises, in the main process; in every process, none of which gets ahead of it.

    Raises:
        ValueError: in the others, with the words of whatever was raised in the main one.
    """
    is_main, result, error = PartialState().is_main_process, None, None
    if is_main:
        try:
            result = work()
        except Exception as raised:  # whatever it is: the others wait to hear of it
            error = raised
    outcome = [result, None if error is None else f"{type(error).__name__}: {error}"]
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]
