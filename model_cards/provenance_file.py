"""provenance.json: what a training wrote of the weights that it lies beside, bound to them by their hashes."""

import hashlib
import json
import warnings
from functools import cache
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError


FILE = "provenance.json"
WEIGHTS, SHARDS = "model.safetensors", "model-?????-of-?????.safetensors"


def write_provenance(folder: str | Path, facts: dict) -> None:
    """Writes facts beside the weights in a folder, and which weights they are about."""
    hashes = {path.name: sha256_of(path) for path in weights_in(folder)}
    facts = {key: value for key, value in facts.items() if key != "weights"} | ({"weights": hashes} if hashes else {})
    unfinished = Path(folder) / f"{FILE}.unfinished"
    unfinished.write_text(json.dumps(facts, indent=2, sort_keys=True, default=str) + "\n")
    unfinished.replace(Path(folder) / FILE)


def read_provenance(name: str | Path | None, revision: str | None = None, token: str | None = None) -> dict | None:
    """What a folder or a repository of the Hub tells of its weights, true or not (`is_about`); None of none."""
    if name is None:
        return None
    options = {"revision": revision, "token": token}
    try:
        file = Path(name) / FILE if Path(name).is_dir() else hf_hub_download(str(name), FILE, **options)
        return json.loads(Path(file).read_text())
    except (FileNotFoundError, EntryNotFoundError):
        return None
    except OSError as error:  # the Hub can't be reached, or there is no such repository
        warnings.warn(f"The {FILE} of {name} could not be read: {type(error).__name__}.", stacklevel=2)
        return None


def trusted_provenance(name: str | Path | None, revision: str | None = None) -> dict | None:
    """What is known of the weights in a folder or a repository of the Hub; None, and a warning, if it is of others."""
    provenance = read_provenance(name, revision)
    if provenance is None or is_about(provenance, weights_in(name)):
        return provenance
    warnings.warn(f"{name}/{FILE} tells of other weights than lie there: it is left out.", stacklevel=2)
    return None


def is_about(provenance: dict | None, weights: list[Path]) -> bool:
    """Whether it was written for weights in safetensors; of one that does not say for which, it is believed."""
    named = (provenance or {}).get("weights")
    return provenance is not None and (
        not named or all(named.get(path.name) == sha256_of(path) for path in weights if path.suffix == ".safetensors")
    )


def weights_in(folder: str | Path) -> list[Path]:
    """The files, of one whole kind; none of a name on the Hub."""
    kinds = (WEIGHTS, SHARDS, "adapter_model.safetensors")
    return next(filter(None, (sorted(Path(folder).glob(kind)) for kind in kinds)), [])


def sha256_of(path: Path) -> str:
    """As the Hub shows it; read once, until the file changes."""
    return _sha256(path.resolve(), path.stat().st_mtime_ns)


@cache
def _sha256(path: Path, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
