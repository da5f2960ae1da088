"""The folder of a training: what a training writes there, whether there is one, and whether there is room for one."""

import shutil
from pathlib import Path

from ..model_cards.provenance_file import FILE, SHARDS, WEIGHTS, weights_in
from ..stream_adapters import FOLDER as ADAPTER
from .checkpoints import checkpoints


RECORD = "run.json"  # of run_record.py
LOG = "log.jsonl"  # of log_lines.py
_STATE = "trainer_state.json"
_WRITTEN = (
    *(WEIGHTS, SHARDS, f"{WEIGHTS}.index.json", "config.json", "generation_config.json"),
    *("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"),
    *(f"{ADAPTER}/adapter_model.safetensors", f"{ADAPTER}/adapter_config.json"),
    *(_STATE, "training_args.bin", "train_results.json", "eval_results.json", "all_results.json"),
    *(FILE, f"{FILE}.unfinished", RECORD, f"{RECORD}.unfinished", LOG),
)
_EVENTS = "events.out.tfevents.*"  # of TensorBoard


def holds_training(folder: Path) -> bool:
    """Whether anything of a training lies there, finished or not, of whatever version."""
    return bool(checkpoints(folder) or weights_in(folder)) or (folder / _STATE).is_file()


def delete_training(folder: Path) -> None:
    """Deletes what a training wrote, by its names, and nothing else that lies there."""
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    for name in _WRITTEN:
        for path in folder.glob(name):
            path.unlink()
    runs = folder / "runs"
    for events in list(runs.rglob(_EVENTS)):
        events.unlink()
    below = sorted((path for path in runs.rglob("*") if path.is_dir()), reverse=True)  # the innermost first
    for path in [*below, runs, folder / ADAPTER]:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def check_room(folder: Path, needed: int) -> None:
    """Raises a ValueError where fewer bytes are free than a training will write, as far as that can be known."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"The disk of `output_dir` {folder} has {free / 1e9:.1f} GB left, but the training will write "
            f"{needed / 1e9:.1f} GB: its checkpoints and the trained model. Make room, set another `output_dir`, or "
            "keep fewer checkpoints (`save_total_limit`)."
        )
