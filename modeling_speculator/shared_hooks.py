"""Hooks on a base model's modules, of which all calls at work share one each."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn


# Of each module that is listened to: by what its hook does, the calls that want it, and its handle. One for all calls:
# a compiled step is guarded by the hooks that were there, and other threads' calls must not change them meanwhile.
_at_work: WeakKeyDictionary = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def shared_hooks(hooks: Iterable[tuple[nn.Module, str, Callable]]) -> Iterator[None]:
    """Modules have hooks meanwhile, once each, however many calls ask for the same.

    Args:
        hooks: module, name of what its hook does, and what registers that: from the module to a handle.
    """
    hooks = list(hooks)
    with _lock:
        for module, name, register in hooks:
            of_module = _at_work.setdefault(module, defaultdict(lambda: [0, None]))
            if of_module[name][0] == 0:
                of_module[name][1] = register(module)
            of_module[name][0] += 1
    try:
        yield
    finally:
        with _lock:
            for module, name, _ in hooks:
                entry = _at_work[module][name]
                entry[0] -= 1
                if entry[0] == 0:
                    entry[1].remove()
                    del _at_work[module][name]
