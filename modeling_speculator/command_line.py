"""What every command does alike: its help, its last lines, a mistake in one line, Ctrl-C, numbers and folders.

No torch here, nor transformers: this is about words on a command line.
"""

import argparse
import enum
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile

import yaml


INTERRUPTED = 130  # a shell's exit status of what Ctrl-C ended
# What a command keeps when it is interrupted.
GOES_ON = "What is done is kept: the same command goes on from there."
FROM_CHECKPOINT = "The same command goes on from the last checkpoint, if one was saved."
NOTHING_KEPT = "Nothing was kept."

PROBE = 2**20  # bytes; the plots and figures of a measurement are fewer
# In the environment of a command that another one runs: that one knows what comes next.
INNER = "MODELING_SPECULATOR_INNER_COMMAND"


def run(main: Callable[[], None], kept: str = NOTHING_KEPT) -> None:
    """Runs a command: what its user got wrong becomes one line on stderr, and so does Ctrl-C.

    The user's are a ValueError, by which everything here says that something was asked for which can't be, an OSError
    (a missing file, a full disk, a Hub that can't be reached), and a YAML file that is none. Anything else is a bug,
    and keeps its traceback; `python -X dev recipes/...` keeps them all.

    Args:
        kept: what is left of the work, and what to do next, where Ctrl-C ends it.
    """
    try:
        main()
    except KeyboardInterrupt as interrupt:  # a trainer says which checkpoint it leaves
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt these lines
        print(f"\n{program()}: interrupted. {str(interrupt) or kept}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, yaml.YAMLError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"{program()}: error: {in_one_line(error)}")


def program() -> str:
    return Path(sys.argv[0]).name


def in_one_line(error: Exception) -> str:
    """What an exception says; of one that the system raised, which file it is about, too."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    return " ".join(str(error).split()) or type(error).__name__


def run_script(script: Path, *arguments: str, **options) -> int:
    """Runs another script in a process of its own, and returns its exit status.

    Ctrl-C reaches both processes. The other one says its line first: it is waited for, and not killed, as
    `subprocess.run` would.

    Args:
        options: of `subprocess.Popen`.

    Raises:
        KeyboardInterrupt: if either was interrupted.
    """
    options["env"] = options.get("env", os.environ) | {INNER: "1"}
    with subprocess.Popen([sys.executable, str(script), *arguments], **options) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            try:
                process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)  # perhaps only this process got it
                process.wait()
            raise
    if status in (INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    return status


def flags_of(**flags) -> list[str]:
    """Flags as a command takes them: of a list all its values, of an empty one the flag alone."""
    arguments = []
    for key, value in flags.items():
        arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def command_of(script: str, **flags) -> str:
    """A command of this project, as one would type it in its folder."""
    return shlex.join(["python", f"recipes/{script}", *flags_of(**flags)])


def say_end(*written: str | Path, then: dict[str, str] | None = None) -> None:
    """What a command says last: what it wrote, and what comes next; see `say_next`."""
    print(f"\nWritten: {', '.join(map(str, written))}", flush=True)
    say_next(then or {})


def say_next(then: dict[str, str]) -> None:
    """The commands that come next, where there are obvious ones. What runs inside another command leaves them out.

    Args:
        then: {what for: a command}.
    """
    if then and INNER not in os.environ:
        print("\n".join(["Next:", *(f"  # {purpose}\n  {command}" for purpose, command in then.items())]), flush=True)


def same_command(without: str | None = None) -> str:
    """The command that runs, perhaps without one of its flags."""
    return shlex.join(["python", *(part for part in sys.argv if part != without)])


def last_lines(file: Path, n: int = 20) -> str:
    """The end of a log, to be shown where what wrote it has failed."""
    return "\n".join(file.read_text(errors="replace").splitlines()[-n:])


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A docstring as it is; and after the help of each option its default, where it has one that the help lacks."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_none = action.required or action.nargs == 0 or action.default in (None, argparse.SUPPRESS)
        if has_none or "(default: " in text:
            return text
        default = _as_typed(action.default).replace("%", "%%")
        return f"{text} (default: {default})".lstrip()


def _as_typed(value) -> str:
    """A value as it is written on a command line, or in a YAML file."""
    if isinstance(value, list | tuple):
        return " ".join(map(_as_typed, value))
    if isinstance(value, bool):
        return str(value).lower()
    return str(value.value if isinstance(value, enum.Enum) else value)


def parser_of(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of a script.

    An option's `metavar` says what its value is counted in, or what it is: TOKENS, MINUTES, FOLDER. Where it has no
    default to be shown, its help ends in what happens without it: "(default: all)".
    """
    return argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter)


def positive(text: str) -> int:
    """An argparse type: a whole number from 1 on."""
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def count(text: str) -> int:
    """An argparse type: a whole number from 0 on."""
    return _number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def positive_number(text: str) -> float:
    """An argparse type, as of a learning rate."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def temperature(text: str) -> float:
    """An argparse type: 0 is greedy."""
    return _number(text, float, lambda value: 0 <= value < math.inf, "a number of at least 0")


def top_p(text: str) -> float:
    """An argparse type: a share of the probability."""
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0 and of at most 1")


def _number(text: str, kind: type, is_right: Callable, expected: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_right(value):
        raise argparse.ArgumentTypeError(f"{expected} is expected, not {text!r}")
    return value


def named_folder(text: str) -> str:
    """An argparse type: NAME=DIR, as it is."""
    if not all(text.partition("=")):
        raise argparse.ArgumentTypeError(f"NAME=DIR is expected, not {text!r}")
    return text


def output_folder(text: str) -> Path:
    """An argparse type: a folder that can be written to, or be made; it is not made yet."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"a folder is expected, but {path} is a file")
    return _checked(path, path)


def output_file(text: str) -> Path:
    """An argparse type: a file that can be written; its folder is made, where it is not there."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"a file is expected, but {path} is a folder")
    _checked(path, path.parent).parent.mkdir(parents=True, exist_ok=True)
    return path


def _checked(path: Path, folder: Path) -> Path:
    try:
        check_writable(folder)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def check_writable(folder: Path) -> None:
    """Raises a ValueError where a folder, there or yet to be made, can't be written to, or its disk has no room."""
    try:
        here = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        with TemporaryFile(dir=here) as probe:  # the one way to know, whatever the system, its users and quotas are
            probe.write(bytes(PROBE))
            probe.flush()
            os.fsync(probe.fileno())  # else a full disk may not show
    except OSError as error:
        raise ValueError(f"nothing can be written to {folder}: {error.strerror}. Take another folder.") from error
