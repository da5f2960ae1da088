"""Where weights come from: what was trained, on what, with what, for how long."""

import dataclasses
import json
import re
import subprocess
from importlib import metadata
from pathlib import Path

import huggingface_hub
import torch
from transformers import PreTrainedModel, TrainingArguments

from ..measuring.benchmarking import digest, machine


_ALWAYS = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "weight_decay")
_PACKAGES = ("modeling-speculator", "torch", "transformers", "accelerate", "datasets", "peft", "huggingface-hub")


# What may be otherwise after a training went on.
_OF_A_SEGMENT = ("arguments", "processes", "git_revision", "versions", "machine")


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


def with_segments(facts: dict, before: dict | None) -> dict:
    """Facts of a training that went on from a checkpoint, and how each stretch of its steps ran, if not alike.

    Args:
        facts: of now, with the `steps_trained` and `seconds` of the whole training.
        before: those that lay in the checkpoint.
    """
    earlier = _segments(before) if before is not None and "steps_trained" in before else []
    first, seconds = 1 + (earlier[-1]["steps"][1] if earlier else 0), sum(part["seconds"] for part in earlier)
    now = _segment(facts, first, round(facts["seconds"] - seconds, 1))
    if earlier and _are_alike(earlier[-1], now):
        last = earlier.pop()
        now = last | {"steps": [last["steps"][0], now["steps"][1]], "seconds": last["seconds"] + now["seconds"]}
    return facts | ({"segments": [*earlier, now]} if earlier else {})


def _segments(facts: dict) -> list[dict]:
    return list(facts.get("segments") or [_segment(facts, 1, facts["seconds"])])


def _segment(facts: dict, first: int, seconds: float) -> dict:
    known = {key: facts[key] for key in _OF_A_SEGMENT if key in facts}
    return {"steps": [first, facts["steps_trained"]], "seconds": seconds} | known


def _are_alike(one: dict, other: dict) -> bool:
    """Whether two segments ran alike, on whatever days."""

    def told(segment: dict) -> dict:
        machine = {key: value for key, value in segment.get("machine", {}).items() if key != "date"}
        return {key: segment.get(key) for key in _OF_A_SEGMENT} | {"machine": machine}

    return told(json.loads(json.dumps(one, default=str))) == told(json.loads(json.dumps(other, default=str)))


def _is_telling(key: str, value, args: TrainingArguments) -> bool:
    """Whether an argument is not at its default, or one that everybody asks for, and says how it was trained."""
    default = defaults(args)
    is_told = key in _ALWAYS or (key in default and value != default[key])
    return is_told and not key.endswith(("_dir", "_token")) and not key.startswith(("hub_", "push_to_hub"))


def defaults(args) -> dict:
    """{field: default} of a dataclass; `dataclasses.MISSING` where there is none."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(args)
    }


def revision_of(name_or_path: str, revision: str | None = None) -> str | None:
    """The commit of a model that was loaded from the Hub; None of a folder that is no snapshot."""
    if Path(name_or_path).is_dir():
        return commit_in(name_or_path)
    cached = huggingface_hub.try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    return commit_in(cached) if isinstance(cached, str) else None


def commit_in(path: str | Path) -> str | None:
    """The commit that a path of the Hub's cache names: of a file or a folder in a snapshot; None of another path."""
    found = re.search(r"/snapshots/([0-9a-f]{40})(/|$)", Path(path).absolute().as_posix())
    return found and found[1]


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
