"""Runs scripts as a shell does, each in a process of its own, but for the seconds that its imports would take.

    done = run(RECIPES / "tune.py", "--base_model", folder, ...)
    assert done.returncode == 0, done.stderr

A warm process forks for each of them; `launch` runs a script by two processes that know of each other, as torchrun
does.
"""

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import warm_server


HERE = Path(__file__).parent


@dataclass
class Server:
    folder: str
    process: subprocess.Popen

    @property
    def address(self) -> str:
        return address_in(self.folder)

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_servers: dict[frozenset, Server] = {}


def run(script: str | Path, *arguments, env: dict[str, str] | None = None, cwd: str | Path | None = None):
    """The finished script, as `subprocess.run(..., capture_output=True, text=True)` returns it.

    Args:
        env: what differs from this process's environment, from the first import on.
    """
    return _run(_server_for(env or {}), script, arguments, cwd, [{}])


def launch(script: str | Path, *arguments, **environment: str):
    """A script that may import the tests' modules, finished by both of two processes; `run` says what is returned.

    Args:
        environment: what is set after the imports.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment |= {"PYTHONPATH": str(HERE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [environment | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    return _run(_server_for({}), script, arguments, None, processes)


def _run(server: Server, script, arguments, cwd, processes: list[dict]) -> subprocess.CompletedProcess:
    command = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        with open(out, "a") as to_out, open(err, "a") as to_err:  # several processes may write to them
            outputs = (to_out.fileno(), to_err.fileno())
            code = warm_server.ask(
                server.address, command[0], command[1:], str(cwd or os.getcwd()), outputs, processes
            )
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


def _server_for(env: dict[str, str]) -> Server:
    key = frozenset(env.items())
    if key not in _servers:
        if len(_servers) == 2:  # each holds half a gigabyte
            _servers.pop(next(iter(_servers))).stop()
        folder = tempfile.mkdtemp()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, warm_server.__file__, address_in(folder)]
        process = subprocess.Popen(command, env=os.environ | env, **pipes)
        assert process.stdout.readline() == "ready\n"
        _servers[key] = Server(folder, process)
        atexit.register(_servers[key].stop)
    return _servers[key]


def address_in(folder: str) -> str:
    return os.path.join(folder, "socket")


def listen_to_ctrl_c() -> None:
    """In a new process: where the tests run in the background, a shell has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
