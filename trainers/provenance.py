"""Where weights come from: what was trained, on what, with what, for how long."""

import dataclasses
import subprocess
from importlib import metadata
from pathlib import Path

import huggingface_hub
import torch
from transformers import PreTrainedModel, TrainingArguments

from ..benchmarking import digest, machine
from ..model_cards.provenance_file import read_provenance


_ALWAYS = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "weight_decay")
_PACKAGES = ("modeling-speculator", "torch", "transformers", "accelerate", "datasets", "peft", "huggingface-hub")


def seconds_in(checkpoint: str | Path) -> float:
    """The training time that a checkpoint says it took; 0 where it does not say."""
    return (read_provenance(checkpoint) or {}).get("seconds", 0.0)


def known_before(args: TrainingArguments, base_model: PreTrainedModel, speculator: PreTrainedModel) -> dict:
    """What is known when a training starts."""
    return {
        "base_model": base_model.config.name_or_path,
        "base_model_revision": revision_of(base_model.config.name_or_path),
        "base_model_weights": digest(base_model),
        "base_model_dtype": None if getattr(base_model, "is_quantized", False) else str(base_model.dtype),
        "speculator": speculator.config.to_diff_dict(),
        "trainable_parameters": sum(weight.numel() for weight in speculator.parameters() if weight.requires_grad),
        "arguments": {key: value for key, value in args.to_dict().items() if _is_telling(key, value, args)},
        "processes": args.world_size,
        "git_revision": git_revision(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "machine": machine() | {"gpus": torch.cuda.device_count()},
    }


def _is_telling(key: str, value, args: TrainingArguments) -> bool:
    """Whether an argument is not at its default, or one that everybody asks for, and says how it was trained."""
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(args)
    }
    is_told = key in _ALWAYS or (key in defaults and value != defaults[key])
    return is_told and not key.endswith(("_dir", "_token")) and not key.startswith(("hub_", "push_to_hub"))


def revision_of(name_or_path: str, revision: str | None = None) -> str | None:
    """The commit of a model that was loaded from the Hub; None of a folder that is no snapshot."""
    if not Path(name_or_path).is_dir():
        cached = huggingface_hub.try_to_load_from_cache(name_or_path, "config.json", revision=revision)
        name_or_path = cached if isinstance(cached, str) else ""
    parts = Path(name_or_path).parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def git_revision() -> str | None:
    """The commit of this code, marked "-dirty" where files differ from it; None where it is not a checkout."""
    here = Path(__file__)
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    for arguments in (["ls-files", "--error-unmatch", here.name], describe):
        try:
            found = subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        if found.returncode:
            return None
    return found.stdout.strip()
