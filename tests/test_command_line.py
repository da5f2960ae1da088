"""Mistakes, Ctrl-C and folders that can't be written to, as every command treats them."""

import argparse
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import listen_to_ctrl_c

from modeling_speculator import command_line


def test_a_mistake_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/tune.py"])
    for error, line in (
        (ValueError("no such\n thing"), "tune.py: error: no such thing"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), "tune.py: error: a.json: No such file or dir"),
        (OSError(28, "No space left on device"), "tune.py: error: No space left on device"),
        (OSError("the Hub can't\nbe reached"), "tune.py: error: the Hub can't be reached"),
        (ValueError(), "tune.py: error: ValueError"),
    ):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit) as end:
            command_line.run(main)
        assert end.value.code.startswith(line) and "\n" not in end.value.code


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("CUDA error"), TypeError("not callable")])
def test_a_bug_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        command_line.run(main)


def test_what_ends_well_says_nothing(capsys):
    command_line.run(lambda: None)
    assert capsys.readouterr() == ("", "")


LOAD = f"""
import importlib.util, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("command_line", {command_line.__file__!r})
command_line = importlib.util.module_from_spec(spec)
spec.loader.exec_module(command_line)
assert not "torch" in sys.modules
"""
CHILD = """
def main():
    print("ready", flush=True)
    try:
        time.sleep(60)
    finally:
        time.sleep(0.5)  # longer than subprocess.run would wait before it kills
command_line.run(main, "Two steps are kept.")
"""
PARENT = """
def main():
    command_line.run_script(Path(sys.argv[1]))
    print("went on")
command_line.run(main, command_line.GOES_ON)
"""


@pytest.mark.parametrize("to_all", [True, False], ids=["a terminal's", "to the parent alone"])
def test_ctrl_c_where_one_command_runs_another(tmp_path, to_all):
    """Each says one line, the inner one first, which ends by itself."""
    for name, code in (("parent.py", PARENT), ("child.py", CHILD)):
        (tmp_path / name).write_text(LOAD + code)
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "child.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=listen_to_ctrl_c) as process:
        assert process.stdout.readline() == "ready\n"
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == command_line.INTERRUPTED
    said = [line for line in stderr.splitlines() if line]
    assert said == ["child.py: interrupted. Two steps are kept.", f"parent.py: interrupted. {command_line.GOES_ON}"]
    assert stdout == ""


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (command_line.positive, {"1": 1, "20": 20}, ["0", "-3", "1.5", "many", ""]),
        (command_line.count, {"0": 0, "5": 5}, ["-1", "0.5"]),
        (command_line.positive_number, {"1e-3": 1e-3}, ["0", "-1", "nan", "inf"]),
        (command_line.temperature, {"0": 0.0, "0.7": 0.7}, ["-1", "nan", "inf", "warm"]),
        (command_line.top_p, {"1": 1.0, "0.9": 0.9}, ["0", "2", "-1", "nan"]),
    ],
)
def test_numbers(kind, right, wrong):
    for text, value in right.items():
        assert kind(text) == value
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match="is expected, not"):
            kind(text)


def test_what_a_command_says_last(capsys, monkeypatch, tmp_path):
    """What was written, and what comes next; inside another command only the first."""
    next_one = command_line.command_of("tune.py", prompts=Path("my prompts.txt"), batch_size=[1, 4], write=[])
    assert next_one == "python recipes/tune.py --prompts 'my prompts.txt' --batch_size 1 4 --write"
    command_line.say_end(Path("out/a.json"), "out/b.png", then={"which dials are best": next_one})
    said = f"\nWritten: out/a.json, out/b.png\nNext:\n  # which dials are best\n  {next_one}\n"
    assert capsys.readouterr().out == said
    command_line.say_end("out", then={})
    assert capsys.readouterr().out == "\nWritten: out\n"
    monkeypatch.setattr(sys, "argv", ["recipes/tune.py", "--dry_run", "--prompts", "my prompts.txt"])
    assert command_line.same_command(without="--dry_run") == "python recipes/tune.py --prompts 'my prompts.txt'"
    inner = tmp_path / "inner.py"
    inner.write_text(LOAD + "command_line.say_end('out', then={'more': 'python more.py'})")
    with open(tmp_path / "log.txt", "w") as log:
        assert command_line.run_script(inner, stdout=log) == 0
    assert (tmp_path / "log.txt").read_text() == "\nWritten: out\n"


def test_the_last_lines_of_a_log(tmp_path):
    (tmp_path / "log.txt").write_bytes(b"".join(b"line %d \xff\n" % number for number in range(50)))
    assert command_line.last_lines(tmp_path / "log.txt", 2) == "line 48 \ufffd\nline 49 \ufffd"


def test_defaults_are_shown_as_they_are_typed(capsys):
    parser = command_line.parser_of("What it does.\n\npython this.py\n")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 20], metavar="TOKENS", help="of a prompt")
    parser.add_argument("--share", default="5 %", metavar="SHARE", help="of 100 %%")
    parser.add_argument("--limit", metavar="PROMPTS", help="at most (default: all)")
    parser.add_argument("--needed", required=True, metavar="FOLDER", help="to read")
    parser.add_argument("--quiet", action="store_true", help="says nothing")
    shown = parser.format_help()
    for line in ("of a prompt (default: 1 20)", "of 100 % (default: 5 %)", "at most (default: all)"):
        assert f" {line}\n" in shown
    assert "What it does.\n\npython this.py" in shown and shown.count("(default: ") == 3


def test_folders_and_files_that_can_be_written(tmp_path):
    assert command_line.output_folder(str(tmp_path / "a/b")) == tmp_path / "a/b"
    assert list(tmp_path.iterdir()) == []  # it is made with what is written
    assert command_line.output_file(str(tmp_path / "a/b.json")) == tmp_path / "a/b.json"
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


def test_folders_and_files_that_can_not(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for kind, path, complaint in (
        (command_line.output_folder, tmp_path / "file", "is a file"),
        (command_line.output_folder, tmp_path / "file/below", "nothing can be written to .*Not a directory"),
        (command_line.output_file, tmp_path, "is a folder"),
        (command_line.output_file, tmp_path / "file/below.json", "nothing can be written"),
        (command_line.output_folder, Path("/proc/1/new"), "nothing can be written"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=complaint):
            kind(str(path))


def test_a_disk_without_room(tmp_path):
    """As a limit on the size of files makes it, where there is no full disk to try."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ValueError, match="nothing can be written to .*File too large"):
            command_line.check_writable(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
