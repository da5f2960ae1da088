"""What a speculator's repository holds: weights, config, card, code, and what was measured; nothing by accident."""

import json
import re
from copy import deepcopy
from pathlib import Path

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoConfig, AutoModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from .. import hub_entry
from ..drafters import DRAFTERS
from ..formats import read_config
from ..measuring.benchmarking import digest
from ..stream_adapters import FOLDER as ADAPTER
from .model_card import render_card
from .provenance_file import FILE, WEIGHTS, is_about


INDEX = "model.safetensors.index.json"
_FILES = (".jsonl", ".json", ".txt", ".gz", ".parquet", ".yaml")
_REMOTE = ("https://", "http://", "hf://", "s3://", "gs://")
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

    Raises:
        ValueError: as `publish`.
    """
    folder = Path(folder)
    speculator = check_folder(folder)
    config, provenance = speculator.config, _read(folder / FILE)
    weights = {path.name: path for path in weight_files(folder)}
    if provenance is not None and not is_about(provenance, weight_files(folder)):
        raise ValueError(f"{folder / FILE} tells of other weights. Delete it, if these lie there rightly.")
    name_base_model(config, provenance, base_model, base_model_revision)
    measured = {"acceptance": acceptance, "latency": latency}
    measured = {name: read_measured(name, path, speculator, provenance) for name, path in measured.items() if path}
    measured, provenance = without_paths(measured), without_paths(provenance)

    parameters = sum(weight.numel() for weight in speculator.parameters())
    card = render_card(repo_id, config, parameters, provenance, **measured, license=license)
    known = measured | ({"provenance": provenance} if provenance else {})
    contents: dict[str, bytes | Path] = weights | {f"{name}.json": _json(value) for name, value in known.items()}
    contents["README.md"] = card.encode()
    contents["config.json"] = _json(config.to_diff_dict() | {"auto_map": auto_map(speculator)})
    contents |= code_files() | adapter_files(folder, config)
    for path, content in contents.items():
        if isinstance(content, bytes) and _TOKEN.search(content.decode()):
            raise ValueError(f"{path} would hold what looks like a token of the Hub: look for it in {folder}.")
    sent = {"config.json", FILE, *weights, *(Path(path).parts[0] for path in contents)}
    return contents, sorted(path.name for path in folder.iterdir() if path.name not in sent)


def adapter_files(folder: Path, config) -> dict[str, bytes | Path]:
    """Of streams that share one with the base model, in peft's format: {path in the repository: what it holds}."""
    if not getattr(config, "shared_adapter", False):
        return {}
    of_peft = _read(folder / ADAPTER / ADAPTER_CONFIG_NAME)
    if of_peft is None:
        raise ValueError(f"{folder} lacks the adapter of its base model ({ADAPTER}/). Load it and save it again.")
    named = {"base_model_name_or_path": config.base_model_name_or_path, "revision": config.base_model_revision}
    weights = folder / ADAPTER / ADAPTER_SAFE_WEIGHTS_NAME
    return {
        f"{ADAPTER}/{ADAPTER_CONFIG_NAME}": _json(of_peft | named),
        f"{ADAPTER}/{ADAPTER_SAFE_WEIGHTS_NAME}": weights,
    }


def check_folder(folder: Path):
    """The speculator in a folder, which has drafted once, unless it can't without its base model.

    Raises:
        ValueError: if it is none, or not in the published form.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no speculator (no config.json). An adapter has to be merged first.")
    written = _read(folder / "config.json")
    if type(AutoConfig.from_pretrained(folder)) not in DRAFTERS:
        raise ValueError(f"{folder} holds a model of type {written.get('model_type')!r}, which is no speculator.")
    if not ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file()) or read_config(written) != written:
        raise ValueError(
            f"{folder} is not in the published form, with safetensors. Write it so: recipes/convert.py --speculator "
            f"{folder} --to mlp_speculator."
        )
    weight_files(folder)  # are all there
    speculator = AutoModel.from_pretrained(folder).eval()
    if not speculator.speculator.needs_base_model:
        states = torch.randn(1, 1, speculator.config.emb_dim, generator=torch.Generator().manual_seed(0))
        speculator.float().generate_candidates(states, torch.zeros(1, 1, dtype=torch.long))
    if not all(bool(weight.isfinite().all()) for weight in speculator.parameters()):
        raise ValueError(f"{folder}: the speculator has weights that are not finite.")
    return speculator


def weight_files(folder: Path) -> list[Path]:
    """The weights, and no other safetensors that lie there: the file, or the index and those that it names.

    Of the two transformers loads the file.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    names = sorted(set(_read(folder / INDEX)["weight_map"].values()))
    if any(Path(name).name != name or not (folder / name).is_file() for name in names):
        raise ValueError(f"{folder / INDEX} names files that are not in its folder.")
    return [folder / INDEX, *(folder / name for name in names)]


def name_base_model(config, provenance: dict | None, base_model: str | None, revision: str | None) -> None:
    """Puts the base model and its commit, as far as known, into a config that is going to be sent.

    Raises:
        ValueError: where nobody else could load it, or the training says another.
    """
    trained_for = (provenance or {}).get("base_model")
    if base_model is None and trained_for not in (None, config.base_model_name_or_path):
        raise ValueError(
            f"The config names {config.base_model_name_or_path!r} as base model, but the training was for "
            f"{trained_for!r}. Say which: `base_model`, --base_model."
        )
    if base_model not in (None, config.base_model_name_or_path):
        config.base_model_name_or_path, config.base_model_revision = base_model, None
    check_base_model(config.base_model_name_or_path, is_given=base_model is not None)
    if trained_for == config.base_model_name_or_path:
        config.base_model_revision = config.base_model_revision or provenance.get("base_model_revision")
    config.base_model_revision = revision or config.base_model_revision


def check_base_model(name: str | None, is_given: bool = False) -> None:
    """Raises a ValueError where a base model is no Hub id: nobody else could load it.

    Args:
        is_given: whether a person calls it one, whatever folders there are.
    """
    try:
        validate_repo_id(name or "")
        is_id = is_given or not Path(name).exists()
    except HFValidationError:
        is_id = False
    if not is_id:
        raise ValueError(
            f"The speculator's base model is {name!r}, which is no model of the Hub. Push that first, and say where: "
            "`base_model`, --base_model ORG/NAME."
        )


def read_measured(name: str, path: str | Path, speculator, provenance: dict | None) -> dict | list:
    """What a recipe has measured of a speculator.

    Raises:
        ValueError: for a file that is not what the recipe writes, or figures of other weights, or beside another base
            model than that of the training.
    """
    recipe, kind = {"acceptance": ("evaluate_acceptance.py", dict), "latency": ("benchmark_latency.py", list)}[name]
    read = _read(Path(path))
    try:
        if not isinstance(read, kind):
            raise TypeError
        if name == "acceptance":
            base, own = read["settings"]["weights"]
            known = [(base, own, read["settings"]["dtype"])]
        else:  # every drafter's rows have a digest, the speculator's among them
            rows = [row for row in read if "speedup" in row and "n_candidates" in row]
            known = [(row.get("base_model_weights"), row["weights"], row["dtype"]) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no {name}.json of {recipe}.") from error
    digests = {dtype: digest(deepcopy(speculator).to(_dtype(dtype))) for dtype in {dtype for *_, dtype in known}}
    known = [(base, dtype) for base, own, dtype in known if own == digests[dtype]]
    if not known:
        raise ValueError(f"{path} was measured with another speculator. Measure this one: {recipe}.")
    trained_beside = (provenance or {}).get("base_model_weights")
    for base, dtype in known:  # in the same dtype, both whole: else they can't be compared
        is_like = dtype == (provenance or {}).get("base_model_dtype") and trained_beside and base
        if is_like and trained_beside != base and "-partly" not in trained_beside + base:
            raise ValueError(f"{path} was measured beside another base model than {provenance['base_model']}.")
    return read if name == "acceptance" else [row for row in read if "speedup" in row]  # no errors, which quote paths


def without_paths(value):
    """JSON with the last name of every path, instead of where it lies on the machine where it was written."""
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    if not isinstance(value, str) or "/" not in value or value.startswith(_REMOTE):
        return value
    is_long = value.count("/") > 1 and " " not in value  # a name on the Hub has one
    is_path = value.startswith(("/", "~", ".")) or value.endswith(_FILES) or Path(value[:250]).exists()
    return Path(value).name if is_long or is_path else value


def auto_map(speculator) -> dict[str, str]:
    """Where a repository's own code has its classes.

    Raises:
        ValueError: for a drafter of somebody's own, whose code is not part of this package.
    """
    names = {"AutoConfig": type(speculator.config).__name__, "AutoModel": type(speculator).__name__}
    for name in names.values():
        if not hasattr(hub_entry, name):
            raise ValueError(f"{name} is not part of this package, so its code would not be sent.")
    return {auto: f"{Path(hub_entry.__file__).stem}.{name}" for auto, name in names.items()}


def code_files() -> dict[str, Path]:
    """The package's own files that a repository carries, {path there: file here}."""
    entry = Path(hub_entry.__file__)
    needed = sorted({entry, *map(Path, get_relative_import_files(entry))})
    return {path.name: path for path in needed} | {
        "custom_generate/generate.py": entry.with_name("custom_generate.py")
    }


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name.removeprefix("torch."))


def _read(path: Path):
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error


def _json(value) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
