"""Checkpoints that say when they are whole: `Trainer` writes them in place, and takes that of the highest number."""

import json
import os
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints


MARKER = "complete.json"  # {file: bytes} of everything else in a checkpoint, written when that is on disk


class SafeTrainer(Trainer):
    """A `Trainer` that marks its checkpoints once they are whole, and goes on from the newest of those."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = latest_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        """Lets go of older checkpoints only when this one is whole."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            run_dir = self._get_output_dir(trial=trial)
            mark_complete(Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            rotate_checkpoints(run_dir, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()


def mark_complete(checkpoint: Path) -> None:
    """Says that a checkpoint is whole, once all that was written to it is on disk."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER)
    for path in files:
        _sync(path)
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    unfinished = checkpoint / f"{MARKER}.unfinished"
    unfinished.write_text(json.dumps(sizes, indent=2))
    _sync(unfinished)
    unfinished.rename(checkpoint / MARKER)
    _sync(checkpoint)


def latest_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run, or None."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = [path for path in Path(output_dir).glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    found.sort(key=lambda path: int(path.name.removeprefix(prefix)))
    return next((str(path) for path in reversed(found) if is_complete(path)), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether all of a checkpoint's files are there, as long as they were when it was marked."""
    if not (checkpoint / MARKER).is_file():
        return False
    sizes = json.loads((checkpoint / MARKER).read_text())
    return all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == sizes[name] for name in sizes)


def _sync(path: Path) -> None:
    """A file may have reached the disk after another that was written later; not from here on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
