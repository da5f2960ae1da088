"""One launch at a time writes to a folder: it holds a lock there, which ends with its processes, killed or not."""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState

from ..command_line import check_writable
from .launch import in_main_process


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK = "run.lock"
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # what such file systems answer

_held: dict[Path, int | None] = {}  # the folders that this process holds, and the open files that lock them


@contextmanager
def hold(folder: str | Path) -> Iterator[None]:
    """Keeps other launches from writing to a folder; it is made where it is not there.

    All processes of a launch hold it together: as long as one of them lives, no other launch gets it. A process that
    holds it already goes on holding it.

    Raises:
        ValueError: if another launch holds it, or nothing can be written to it.
    """
    folder = Path(folder).resolve()
    if folder in _held:
        yield
        return
    was_there = in_main_process(lambda: _take(folder))
    if not PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)  # on another machine it may be another folder
        _held[folder] = _locked(folder, shared=True)
    try:
        yield
    finally:
        handle = _held.pop(folder)
        if not was_there and _is_last(handle):
            _tidy(folder)
        _let_go(handle)


def _take(folder: Path) -> bool:
    """Gets the lock alone, as one launch of all can, and shares it from then on; whether the folder was there."""
    was_there = folder.exists()
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle = _locked(folder, shared=False)
    if handle is not None:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:  # from one to the other it is free for a moment
            os.close(handle)
            raise _refusal(folder, "another process") from error
    _held[folder] = handle
    return was_there


def _locked(folder: Path, shared: bool) -> int | None:
    """The lock file, open and locked; None where there are no locks."""
    if fcntl is None:
        _warn(folder, "this system has none")
        return None
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(handle, 1000, 0).decode() or "another process"
        os.close(handle)
        if error.errno in _WITHOUT_LOCKS:
            _warn(folder, error.strerror)
            return None
        if not isinstance(error, BlockingIOError):
            raise
        raise _refusal(folder, holder) from error
    if _is_still_there(handle, folder / LOCK):
        return handle
    os.close(handle)
    return _locked(folder, shared)


def _refusal(folder: Path, holder: str) -> ValueError:
    return ValueError(
        f"{folder} is written to by {holder}. Wait for its end, or set another folder (`output_dir`, "
        "`generated_dataset`)."
    )


def _is_still_there(handle: int, path: Path) -> bool:
    """Whether an open file was not deleted meanwhile, by a launch that ended."""
    return path.exists() and os.path.samestat(os.fstat(handle), os.stat(path))


def _warn(folder: Path, reason: str) -> None:
    logger.warning("No lock for %s (%s): see to it that nothing else writes to it meanwhile.", folder, reason)


def _is_last(handle: int | None) -> bool:
    """Whether no other process of the launch holds the folder any more."""
    if handle is None:
        return PartialState().is_main_process
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _tidy(folder: Path) -> None:
    """Leaves nothing of a launch that made the folder and saved nothing there."""
    if [path.name for path in folder.iterdir()] in ([], [LOCK]):
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _let_go(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _forget() -> None:
    """A child has its parent's open files, and with them its locks: a data loader would outlive a killed training."""
    while _held:
        _let_go(_held.popitem()[1])


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)
