"""Runs scripts as a shell does, each in a process of its own, but for the seconds that its imports would take.

    done = run(RECIPES / "tune.py", "--base_model", folder, ...)
    assert done.returncode == 0, done.stderr

A process imports what the scripts do, and forks for each of them, and for each that they run.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


_SERVER = """
import atexit, importlib, json, os, runpy, sys, traceback

import datasets, evaluate, matplotlib.pyplot, tqdm, torch, transformers
import modeling_speculator.model_cards, modeling_speculator.trainers
for module in ("acceptance", "latency", "quality", "tuning"):
    importlib.import_module(f"modeling_speculator.measuring.{module}")
from modeling_speculator import command_line
torch.set_num_threads(1)
print("ready", flush=True)


def forked(script, *arguments, stdout=None, stderr=None, env=None):
    "Takes the place of `command_line.run_script`: what a command runs forks, too."
    child = os.fork()
    if child == 0:
        for file, descriptor in ((stdout, 1), (stderr, 2)):
            if file is not None:
                os.dup2(file.fileno(), descriptor)
        os.environ.update((env or os.environ) | {command_line.INNER: "1"})
        run(str(script), arguments)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(script, arguments):
    sys.argv = [script, *arguments]
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


command_line.run_script = forked
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.stdin.close()
        script, arguments, out, err, cwd = json.loads(line)
        for path, descriptor in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.chdir(cwd)
        run(script, arguments)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
_servers: dict[frozenset, subprocess.Popen] = {}


def run(script: str | Path, *arguments, env: dict[str, str] | None = None, cwd: str | Path | None = None):
    """The finished script, as `subprocess.run(..., capture_output=True, text=True)` returns it.

    Args:
        env: what differs from this process's environment.
    """
    server = _server_for(env or {})
    command = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = (os.path.join(folder, name) for name in ("out", "err"))
        server.stdin.write(json.dumps([command[0], command[1:], out, err, str(cwd or os.getcwd())]) + "\n")
        server.stdin.flush()
        returncode = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, returncode, Path(out).read_text(), Path(err).read_text())


def _server_for(env: dict[str, str]) -> subprocess.Popen:
    key = frozenset(env.items())
    if key not in _servers:
        if len(_servers) == 2:  # each holds half a gigabyte
            _stop(_servers.pop(next(iter(_servers))))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        server = _servers[key] = subprocess.Popen([sys.executable, "-c", _SERVER], env=os.environ | env, **pipes)
        assert server.stdout.readline() == "ready\n"
        atexit.register(_stop, server)
    return _servers[key]


def _stop(server: subprocess.Popen) -> None:
    server.stdin.close()
    server.wait()


def listen_to_ctrl_c() -> None:
    """In a new process: where the tests run in the background, a shell has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
