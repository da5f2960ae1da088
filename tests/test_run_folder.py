"""An output folder that nothing can be written to, or a disk without room, is noticed before the work."""

import errno
import os
import shutil
from collections import namedtuple

import pytest
from trainings import arguments, speculator

from modeling_speculator.trainers import hold, run_folder


Usage = namedtuple("Usage", "total used free")
WEIGHTS = sum(weight.nbytes for weight in speculator().parameters())


def refuse(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_folder_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match="Nothing can be written to `output_dir` .*file/run: Not a directory. Set "):
        with hold(tmp_path / "file/run"):
            pytest.fail("it is no folder")


@pytest.mark.parametrize(("where", "code"), [("builtins.open", errno.EROFS), ("os.fsync", errno.ENOSPC)])
def test_a_folder_that_can_not_be_written_to(tmp_path, monkeypatch, where, code):
    """Whoever runs the tests: nobody keeps root from writing."""
    monkeypatch.setattr(where, refuse(code))
    with pytest.raises(ValueError) as error:
        run_folder.check_writable(tmp_path)
    monkeypatch.undo()
    assert os.strerror(code) in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"save_strategy": "no"}, WEIGHTS),  # the trained model
        ({"save_steps": 4}, 4 * WEIGHTS),  # and a checkpoint, with AdamW's two moments
        ({"save_steps": 1}, (4 * 3 + 1) * WEIGHTS),
        ({"save_steps": 1, "save_total_limit": 1}, (2 * 3 + 1) * WEIGHTS),
        ({"save_steps": 4, "save_only_model": True}, 2 * WEIGHTS),
    ],
    ids=str,
)
def test_a_disk_without_room_for_what_will_be_written(tmp_path, llama, make_trainer, monkeypatch, options, needed):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 0, needed - 1))
    trainer = make_trainer(llama, arguments(tmp_path, **options))
    with pytest.raises(ValueError, match="has 0.0 GB left, but the training will write.*`save_total_limit`"):
        trainer.train()
    assert trainer.state.global_step == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 0, needed))
    trainer.train()
    assert trainer.state.global_step == 4
