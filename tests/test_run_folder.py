"""An output folder that nothing can be written to, or a disk without room, is noticed before the work."""

import errno
import os
import shutil
from collections import namedtuple

import pytest
from trainings import arguments, speculator

from modeling_speculator.trainers import hold


Usage = namedtuple("Usage", "total used free")
WEIGHTS = sum(weight.nbytes for weight in speculator().parameters())


def refuse(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_folder_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match="nothing can be written to .*file/run: Not a directory. Take another"):
        with hold(tmp_path / "file/run"):
            pytest.fail("it is no folder")


@pytest.mark.parametrize(("where", "code"), [("os.open", errno.EROFS), ("os.fsync", errno.ENOSPC)])
def test_a_folder_that_can_not_be_written_to(tmp_path, monkeypatch, where, code):
    """Whoever runs the tests: nobody keeps root from writing."""
    with monkeypatch.context() as patch:
        patch.setattr(where, refuse(code))
        with pytest.raises(ValueError, match=os.strerror(code)):
            with hold(tmp_path):
                pytest.fail("nothing can be written there")
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
