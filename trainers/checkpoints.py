"""Checkpoints that say when they are whole: `Trainer` writes them in place, and takes that of the highest number."""

import json
import os
import shutil
from pathlib import Path

from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..transformers_api import check_contract, run_dir


# Written when everything else of a checkpoint is on disk: {"files": {name: bytes}, "can_resume": whether it is more
# than the model}.
MARKER = "complete.json"


class SafeTrainer(Trainer):
    """A `Trainer` that marks its checkpoints once they are whole, and goes on from the newest of those."""

    def __init__(self, *args, **kwargs):
        check_contract("train")
        super().__init__(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = latest_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        """None for a run that was finished already: `Trainer` looks at the number of steps only after a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        """Lets go of older checkpoints only when this one is whole."""
        folder = Path(run_dir(self, trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:  # it may be there, of a run that went on from before
            (checkpoint / MARKER).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(checkpoint, can_resume=not self.args.save_only_model)
            if limit is not None and limit > 0:
                rotate(folder, limit, keep={str(checkpoint), str(self.state.best_model_checkpoint)})
        self.accelerator.wait_for_everyone()


def rotate(folder: Path, limit: int, keep: set[str]) -> None:
    """Deletes checkpoints that were cut off, and the oldest of the others, until `limit` are left; never `keep`."""
    found = checkpoints(folder)
    whole = sorted(filter(is_complete, found), key=lambda path: (path / MARKER).stat().st_mtime_ns)
    can_go = [path for path in whole if str(path) not in keep]
    too_many = can_go[: max(0, len(whole) - limit)]
    for path in [path for path in found if path not in whole] + too_many:
        shutil.rmtree(path, ignore_errors=True)


def mark_complete(checkpoint: Path, can_resume: bool = True) -> None:
    """Says that a checkpoint is whole, once all that was written to it is on disk."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    unfinished = checkpoint / f"{MARKER}.unfinished"
    unfinished.write_text(json.dumps({"files": sizes, "can_resume": can_resume}, indent=2))
    _sync(unfinished)
    unfinished.rename(checkpoint / MARKER)
    _sync(checkpoint)


def latest_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run that it can go on from, or None."""
    found = reversed(checkpoints(Path(output_dir)))
    return next((str(path) for path in found if is_complete(path) and _marker(path)["can_resume"]), None)


def steps_in(checkpoint: str | Path) -> int:
    """The steps that a checkpoint was trained for."""
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, whole or not, by their steps."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = [path for path in folder.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))


def is_complete(checkpoint: Path) -> bool:
    """Whether all of a checkpoint's files are there, as long as they were when it was marked."""
    if not (checkpoint / MARKER).is_file():
        return False
    sizes = _marker(checkpoint)["files"]
    return all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == sizes[name] for name in sizes)


def _marker(checkpoint: Path) -> dict:
    return json.loads((checkpoint / MARKER).read_text())


def _sync(path: Path) -> None:
    """A file may have reached the disk after another that was written later; not from here on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
