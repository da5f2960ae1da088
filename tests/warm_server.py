"""A process that has imported what the recipes import, and forks for each script that it is asked to run.

python warm_server.py SOCKET

It has no threads, and what a script runs in its turn is forked here, too: a fork of a process with threads may find a
lock taken that nobody lets go.
"""

import atexit
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path


LONGEST = 300  # seconds that a script may take


def ask(
    address: str, script: str, arguments: list[str], cwd: str, outputs: tuple[int, int], processes: list[dict]
) -> int:
    """The exit status of a script that a server ran.

    Args:
        outputs: open files, for what it prints and complains of.
        processes: for each that runs it, what is set in its environment.

    Raises:
        TimeoutError: if it takes too long.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(LONGEST)
        connection.connect(address)
        socket.send_fds(connection, [json.dumps([script, arguments, cwd, processes]).encode()], outputs)
        return int(connection.recv(100))


def serve(address: str) -> None:
    """Until its standard input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                answer(connection)
                os._exit(0)
            connection.close()


def answer(connection: socket.socket) -> None:
    message, outputs, *_ = socket.recv_fds(connection, 1 << 18, 2)
    script, arguments, cwd, processes = json.loads(message)
    children, code = set(), 0
    for environment in processes:
        children.add(child := os.fork())
        if child == 0:
            connection.close()
            for file, descriptor in zip([os.open(os.devnull, os.O_RDONLY), *outputs], range(3), strict=True):
                os.dup2(file, descriptor)
            os.chdir(cwd)
            os.environ.update(environment)
            paths = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
            sys.path[:0] = [os.path.dirname(script), *paths]
            run(script, arguments)
    while children:
        child, status = os.wait()
        children.remove(child)
        code = code or os.waitstatus_to_exitcode(status)
        for other in children if code else ():
            os.kill(other, signal.SIGKILL)
    connection.send(str(code).encode())


def run(script: str, arguments: list[str]) -> None:
    """As `python script` does, and ends the process."""
    sys.argv, code = [script, *arguments], 0
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


def main(address: str) -> None:
    import importlib

    for module in ("datasets", "evaluate", "matplotlib.pyplot", "tqdm", "torch", "transformers"):
        importlib.import_module(module)
    for module in ("acceptance", "latency", "quality", "tuning"):
        importlib.import_module(f"modeling_speculator.measuring.{module}")
    for module in ("model_cards", "trainers"):
        importlib.import_module(f"modeling_speculator.{module}")
    import torch
    import tqdm

    from modeling_speculator import command_line

    def run_script(script: Path, *arguments: str, stdout=None, stderr=None, env=None) -> int:
        "Takes the place of `command_line.run_script`."
        outputs = (stdout.fileno() if stdout else 1, stderr.fileno() if stderr else 2)
        environment = dict(env or os.environ) | {command_line.INNER: "1"}
        return ask(address, str(script), list(arguments), os.getcwd(), outputs, [environment])

    command_line.run_script = run_script
    torch.set_num_threads(1)
    tqdm.tqdm.set_lock(threading.RLock())  # its own is one for all forks, and a process may end while it holds it
    serve(address)


if __name__ == "__main__":
    main(*sys.argv[1:])
