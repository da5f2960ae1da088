"""A folder is trained into by one launch at a time."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import commands
import pytest
from accelerate import PartialState
from trainings import arguments
from transformers import TrainerCallback

from modeling_speculator.trainers import hold, run_lock
from modeling_speculator.trainers.run_lock import LOCK


PartialState(cpu=True)

HOLD = """
import sys, time
from accelerate import PartialState
from modeling_speculator.trainers.run_lock import hold
PartialState(cpu=True)
"""
# Its children say that they are there, and outlive it.
KILLED = f"""{HOLD}
import os, subprocess
with hold(sys.argv[1]):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""
# The processes of one launch; the main one ends first.
LAUNCHED = f"""{HOLD}
import fcntl
from pathlib import Path
state = PartialState()
with hold(sys.argv[1]):
    state.wait_for_everyone()
    if not state.is_main_process:
        time.sleep(2)
        try:
            fcntl.flock(open(sys.argv[1] + "/{LOCK}"), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("still held")
state.wait_for_everyone()
if state.is_main_process:
    Path(sys.argv[2]).touch()
while not Path(sys.argv[3]).exists():
    time.sleep(0.1)
try:
    with hold(sys.argv[1]):
        print("got it")
except ValueError as error:
    print("refused:", error)
state.destroy_process_group()
"""


@contextmanager
def another_launch(folder):
    """Holds the lock by a file that it opened itself, as another process would."""
    folder.mkdir(exist_ok=True)
    with open(folder / LOCK, "w") as file:
        file.write("process 7 on elsewhere")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def is_free(folder):
    with open(folder / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_second_launch_is_refused(tmp_path):
    folder = tmp_path / "run"
    with another_launch(folder):
        with pytest.raises(ValueError, match="run is written to by process 7 on elsewhere.*another folder"):
            with hold(folder):
                pytest.fail("it got the lock")
    with hold(folder), hold(f"{folder}/../run"):  # by whatever name; one process may hold it twice
        assert not is_free(folder)


def test_a_trainer_is_refused_and_holds_its_folder(tmp_path, llama, make_trainer):
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            assert not is_free(tmp_path)

    trainer = make_trainer(llama, arguments(tmp_path, max_steps=1), callbacks=[Look()])
    with another_launch(tmp_path), pytest.raises(ValueError, match="written to by process 7"):
        trainer.train()
    trainer.train()
    assert is_free(tmp_path)


def test_a_killed_process_leaves_no_lock_and_neither_do_its_children(tmp_path):
    """As a data loader's workers, which are forks of a training that was killed."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        assert not is_free(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(child, 0)  # it lives
        with hold(tmp_path):
            assert not is_free(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_processes_of_a_launch_hold_it_together(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    released, taken = tmp_path / "released", tmp_path / "taken"
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(commands.launch, script, tmp_path / "run", released, taken)
        while not released.exists():
            assert not done.done(), done.result().stderr
            time.sleep(0.1)
        with another_launch(tmp_path / "run"):
            taken.touch()
            done = done.result()
    assert done.returncode == 0, done.stderr
    assert "still held" in done.stdout
    assert done.stdout.count("run is written to by process 7") == 2 and "got it" not in done.stdout


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_where_there_are_no_locks_that_is_said(tmp_path, monkeypatch, caplog, code):
    def flock(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    with hold(tmp_path):
        assert f"No lock for {tmp_path} ({os.strerror(code)})" in caplog.text


def test_a_system_without_locks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_lock, "fcntl", None)
    with hold(tmp_path):
        assert f"No lock for {tmp_path} (this system has none)" in caplog.text


def test_a_lock_file_that_was_deleted_meanwhile_is_none(tmp_path, monkeypatch):
    """Another launch had opened it before: the lock of a file that nobody else can open keeps nobody out."""
    flock, calls = run_lock.fcntl.flock, []

    def delete_first(file, how):
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(how)
        flock(file, how)

    monkeypatch.setattr(run_lock.fcntl, "flock", delete_first)
    with hold(tmp_path):
        monkeypatch.undo()
        assert not is_free(tmp_path)


def test_nothing_is_left_of_a_launch_that_saved_nothing(tmp_path):
    with hold(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with hold(tmp_path / "new"):
        (tmp_path / "new/model.safetensors").write_text("trained")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"model.safetensors", LOCK}
    (tmp_path / "theirs").mkdir()
    with hold(tmp_path / "theirs"):
        pass
    assert (tmp_path / "theirs").is_dir()
