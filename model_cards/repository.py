"""What a speculator's repository holds: weights, config, card, code, and what was measured; nothing by accident."""

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoModel
from transformers.dynamic_module_utils import get_relative_import_files

from .. import hub_entry
from ..benchmarking import digest
from .model_card import render_card


# What is sent of a folder, as it is. Nothing else is: optimizer states, checkpoints, caches, .env stay here.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# What earlier versions may have left that a new one does not have.
OURS = (*WEIGHTS, "*.bin", "*.py", "custom_generate/*", "acceptance.json", "latency.json", "provenance.json")
_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{30,}\b")


def collect(
    folder: str | Path,
    repo_id: str,
    base_model: str | None = None,
    base_model_revision: str | None = None,
    acceptance: str | Path | None = None,
    latency: str | Path | None = None,
    license: str | None = None,
) -> tuple[dict[str, bytes | Path], list[str]]:
    """What a repository is to hold, {path: content or the file that holds it}, and what of the folder is left out.

    The folder's config.json is not changed: code, base model and its commit are added to what is sent.
    """
    folder = Path(folder)
    speculator = check_folder(folder)
    config = speculator.config
    if base_model in (None, config.base_model_name_or_path):
        check_base_model(config.base_model_name_or_path, is_given=base_model is not None)
        config.base_model_revision = base_model_revision or config.base_model_revision
    else:
        check_base_model(base_model, is_given=True)
        config.base_model_name_or_path, config.base_model_revision = base_model, base_model_revision
    provenance = _read(folder / "provenance.json")
    if provenance and provenance.get("base_model") == config.base_model_name_or_path:
        config.base_model_revision = config.base_model_revision or provenance.get("base_model_revision")
    provenance = without_paths(provenance)
    measured = {"acceptance": acceptance, "latency": latency}
    measured = {name: without_paths(read_measured(name, path)) for name, path in measured.items() if path}
    if "acceptance" in measured:
        check_measured(measured["acceptance"]["settings"], speculator, acceptance)

    contents: dict[str, bytes | Path] = {
        path.name: path for path in sorted(folder.iterdir()) if any(fnmatch(path.name, kind) for kind in WEIGHTS)
    }
    parameters = sum(weight.numel() for weight in speculator.parameters())
    card = render_card(repo_id, config, parameters, provenance, **measured, license=license)
    contents["README.md"] = card.encode()
    contents["config.json"] = _json(config.to_diff_dict() | {"auto_map": auto_map(speculator)})
    known = measured | ({"provenance": provenance} if provenance else {})
    contents |= {f"{name}.json": _json(value) for name, value in known.items()}
    contents |= code_files()
    for path, content in contents.items():
        if isinstance(content, bytes) and _TOKEN.search(content.decode()):
            raise ValueError(f"{path} would hold what looks like a token of the Hub: look for it in {folder}.")
    sent = {path.name for path in contents.values() if isinstance(path, Path)} | set(contents)
    return contents, sorted(path.name for path in folder.iterdir() if path.name not in sent)


def check_folder(folder: Path):
    """The speculator in a folder, which has drafted once.

    Raises:
        ValueError: if it is none, or not in safetensors.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no speculator (no config.json). An adapter has to be merged first.")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds no safetensors. Write them: recipes/convert.py --speculator {folder} --to mlp_speculator."
        )
    speculator = AutoModel.from_pretrained(folder).eval()
    config = speculator.config
    states = torch.randn(1, 1, config.emb_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    drafts = speculator.float().generate_candidates(states, torch.zeros(1, 1, dtype=torch.long))
    finite = all(bool(weight.isfinite().all()) for weight in speculator.parameters())
    if drafts.shape[1] != config.n_candidates or not finite:
        raise ValueError(f"{folder}: the speculator has weights that are not finite.")
    return speculator


def check_base_model(name: str | None, is_given: bool = False) -> None:
    """Raises a ValueError where a base model is no Hub id: nobody else could load it.

    Args:
        is_given: whether a person calls it one, whatever folders there are.
    """
    try:
        validate_repo_id(name or "")
        is_id = name.count("/") == 1 and (is_given or not Path(name).exists())
    except HFValidationError:
        is_id = False
    if not is_id:
        raise ValueError(
            f"The speculator's base model is {name!r}, which is no model of the Hub. Push that first, and say where: "
            "`base_model`, --base_model ORG/NAME."
        )


def read_measured(name: str, path: str | Path) -> dict | list:
    """Raises a ValueError for a file that is not what the recipe writes."""
    recipe, kind = {"acceptance": ("evaluate_acceptance.py", dict), "latency": ("benchmark_latency.py", list)}[name]
    read = _read(Path(path))
    if not isinstance(read, kind) or (kind is dict and "settings" not in read):
        raise ValueError(f"{path} is no {name}.json of {recipe}.")
    return read


def check_measured(settings: dict, speculator, file: str | Path) -> None:
    """Raises a ValueError where figures are those of other weights."""
    dtype = getattr(torch, settings["dtype"].removeprefix("torch."))
    if digest(speculator.to(dtype)) != settings["weights"][1]:
        raise ValueError(f"{file} was measured with another speculator, {settings['speculator']}. Measure this one.")


def without_paths(value):
    """JSON with the last name of every path, instead of where it lies on this machine."""
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    is_path = isinstance(value, str) and "/" in value
    if is_path and (value.startswith(("/", "~", ".")) or Path(value[:250]).exists()):
        return Path(value).name
    return value


def auto_map(speculator) -> dict[str, str]:
    """Where a repository's own code has its classes."""
    entry = Path(hub_entry.__file__).stem
    names = {"AutoConfig": type(speculator.config).__name__, "AutoModel": type(speculator).__name__}
    return {auto: f"{entry}.{name}" for auto, name in names.items()}


def code_files() -> dict[str, Path]:
    """The package's own files that a repository carries, {path there: file here}."""
    entry = Path(hub_entry.__file__)
    needed = sorted({entry, *map(Path, get_relative_import_files(entry))})
    return {path.name: path for path in needed} | {
        "custom_generate/generate.py": entry.with_name("custom_generate.py")
    }


def _read(path: Path):
    return json.loads(path.read_text()) if path.is_file() else None


def _json(value) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
