"""Checkpoints that say when they are whole: `Trainer` writes them in place, and takes that of the highest number."""

import json
import os
import shutil
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


# Written when everything else of a checkpoint is on disk: {"files": {name: bytes}, "can_resume": whether it is more
# than the model, "run": the identity of the training that wrote it}.
MARKER = "complete.json"


def rotate(folder: Path, limit: int, keep: set[str]) -> None:
    """Deletes checkpoints that were cut off, and the oldest of the others, until `limit` are left; never `keep`."""
    found = checkpoints(folder)
    whole = sorted(filter(is_complete, found), key=lambda path: (path / MARKER).stat().st_mtime_ns)
    can_go = [path for path in whole if str(path) not in keep]
    too_many = can_go[: max(0, len(whole) - limit)]
    for path in [path for path in found if path not in whole] + too_many:
        shutil.rmtree(path, ignore_errors=True)


def mark_complete(checkpoint: Path, run: str, can_resume: bool = True) -> None:
    """Says that a checkpoint of a training is whole, once all that was written to it is on disk."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    unfinished = checkpoint / f"{MARKER}.unfinished"
    unfinished.write_text(json.dumps({"files": sizes, "can_resume": can_resume, "run": run}, indent=2))
    _sync(unfinished)
    unfinished.rename(checkpoint / MARKER)
    _sync(checkpoint)


def newest_checkpoint(folder: Path, run: str) -> str | None:
    """The newest complete checkpoint that one training wrote, of those that it can go on from, or None."""
    return next((str(path) for path in reversed(checkpoints(folder)) if can_resume(path, run)), None)


def can_resume(checkpoint: Path, run: str) -> bool:
    """Whether a training can go on from a checkpoint: it is whole, more than the model, and its own."""
    return is_complete(checkpoint) and _marker(checkpoint)["can_resume"] and _marker(checkpoint).get("run") == run


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
