"""What the training in a folder is made of: a run goes on with it where it is the same, and is refused otherwise."""

import json
import logging
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from .checkpoints import newest_checkpoint
from .launch import in_main_process
from .run_folder import RECORD, delete_training, holds_training


logger = logging.getLogger(__name__)

_LENGTHS = ("max_steps", "num_train_epochs")  # which can be raised: the training is then extended
_TWO_WAYS = "Set another `output_dir`, or `--overwrite_output_dir true`, which deletes that training."


@dataclass(frozen=True)
class Settings:
    """What decides what a training makes.

    Args:
        values: in JSON's types.
        unset: the keys among them that are at their default: a training that does not know them was at it, too.
    """

    values: dict
    unset: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RunRecord:
    """A training and the folder that it writes to.

    Args:
        settings: those that decide what it makes.
        identity: what its checkpoints carry. No other training goes on from them.
    """

    folder: Path
    settings: dict
    identity: str = field(default_factory=lambda: secrets.token_hex(8))

    def anew(self) -> "RunRecord":
        """A training of the same settings that begins from nothing."""
        return RunRecord(self.folder, self.settings)

    def latest_checkpoint(self) -> str | None:
        """Its newest complete checkpoint that it can go on from, or None."""
        return newest_checkpoint(self.folder, self.identity)

    def write(self) -> None:
        """Says in the folder which training it is that lies there from here on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{RECORD}.unfinished"
        with open(unfinished, "w") as file:
            json.dump({"run": self.identity, "settings": self.settings}, file, indent=2, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.folder / RECORD)


def read_record(output_dir: str | Path) -> dict | None:
    """The settings of the training that lies in a folder, as far as it has saved anything; None where none does."""
    record = _read(Path(output_dir))
    return record and record.settings


def latest_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of the training in a folder that it can go on from, or None."""
    record = _read(Path(output_dir))
    return record and record.latest_checkpoint()


def open_run(output_dir: str | Path, settings: Settings, overwrite: bool = False) -> RunRecord:
    """The training that lies in a folder, if it is one of these settings; a new one, if none lies there.

    Args:
        overwrite: delete what lies there of a training.

    Raises:
        ValueError: if what lies there was made with other settings, or of a version that did not write them down.
    """
    return in_main_process(lambda: _open(Path(output_dir), settings, overwrite))


def _open(folder: Path, settings: Settings, overwrite: bool) -> RunRecord:
    if overwrite:
        delete_training(folder)
    if not holds_training(folder):
        return RunRecord(folder, settings.values)
    found = _read(folder)
    if found is None:
        raise ValueError(
            f"{folder} holds a training without a {RECORD}, as older versions left it, which does not say what it was "
            f"made of. {_TWO_WAYS}"
        )
    differ = differences(found.settings, settings)
    if differ:
        raise ValueError(f"{folder} holds a training of other settings: {'; '.join(differ)}. {_TWO_WAYS}")
    for key in _LENGTHS:
        before, now = found.settings.get(key), settings.values.get(key)
        if before is not None and now is not None and before != now:
            logger.warning(
                "`%s` is raised from %s to %s: the learning rate goes on along the schedule of the longer training.",
                *(key, before, now),
            )
    return RunRecord(folder, found.settings | settings.values, found.identity)


def differences(found: dict, settings: Settings) -> list[str]:
    """A line for each setting that is not what it was: the key, what it was, and what it is."""
    differ = []
    for key, now in settings.values.items():
        if key not in found and key in settings.unset:  # of a later version
            continue
        before = found.get(key)
        if not _are_alike(key, before, now):
            hint = " (it can only be raised)" if key in _LENGTHS else ""
            differ.append(f"`{key}` was {_shown(before)}, is {_shown(now)}{hint}")
    return sorted(differ)


def _are_alike(key: str, before, now) -> bool:
    if isinstance(before, dict) and isinstance(now, dict) and "holds" in before:
        return before["holds"] == now.get("holds")
    return before == now or (key in _LENGTHS and before is not None and 0 < before < now)


def _shown(value) -> str:
    if isinstance(value, dict) and "holds" in value:
        return f"{value['name']!r} ({_shortened(value['holds'])})"
    return repr(value)


def _shortened(holds: str) -> str:
    """Hashes and commits to their first digits, as people compare them."""
    return re.sub(r"([0-9a-f]{12})[0-9a-f]+", r"\1", holds)


def _read(folder: Path) -> RunRecord | None:
    try:
        written = json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        return None
    return RunRecord(folder, written["settings"], written["run"])
