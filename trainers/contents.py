"""What data and models are, wherever they lie: hashes of local files, commits of the Hub's repositories."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
from transformers.utils import CONFIG_NAME, cached_file, find_adapter_config_file

from ..loading import config_of
from ..measuring.named_datasets import in_one_line
from ..measuring.prompts import Prompt
from ..measuring.text_files import suffix_of
from .provenance import commit_in
from .texts import matching_files


# What transformers reads of a model's folder: weights, configs, tokenizer, code.
_OF_A_MODEL = (
    *("*.safetensors", "*.bin", "*.gguf", "*.index.json", "*config.json", "*.py", "chat_template*"),
    *("tokenizer*", "*.model", "*.tiktoken", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)
_NOT_OF_IT = ("training_args.bin", "optimizer.bin")
# Keys of configs that say where something lies, or who wrote it.
_SPELLINGS = ("_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version")

_SAID_FROM = 4e9  # bytes, whose hash may take ten seconds


def of_model(name: str, revision: str | None = None) -> str:
    """What a folder or a Hub id holds; of an adapter, and of the model that it is for."""
    folder = Path(name)
    own = _of_model_folder(folder) if folder.is_dir() else f"commit:{_commit_of_model(name, revision)}"
    adapter = find_adapter_config_file(name, revision=revision)
    if adapter is None:
        return own
    config = json.loads(Path(adapter).read_text())
    return f"{own} on {of_model(config['base_model_name_or_path'], config.get('revision'))}"


def of_dataset(name: str, config: str | None = None, revision: str | None = None) -> str:
    """What a folder or a Hub id holds, as `datasets.load_dataset` takes them."""
    folder = Path(name)
    if not folder.exists():  # offline, what is in the cache
        with in_one_line(name):
            return f"commit:{datasets.load_dataset_builder(name, config, revision=revision).hash}"
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else [folder]
    names = {str(path.relative_to(folder)): path for path in files}
    return _hash({name: path for name, path in names.items() if not _is_no_data(Path(name))}, name)


def of_files(patterns: list[str]) -> str:
    """What the files are that `data_files` names, in their order: their names don't count, but for the kind."""
    paths = matching_files(patterns)
    return _hash({f"{at:09}{suffix_of(path)}": Path(path) for at, path in enumerate(paths)}, "the data")


def of_prompts(prompts: list[Prompt], held_out: list[list[Prompt]]) -> str:
    """What prompts say, wherever they were read, and those that are left out of them."""
    texts = [[prompt.turns[0], prompt.token_ids] for prompt in prompts]
    not_these = sorted({turn for some in held_out for prompt in some for turn in prompt.turns})
    return f"sha256:{_digest([texts, not_these])}"


def _is_no_data(path: Path) -> bool:
    """Whether `datasets` does not read it, or left it in a folder that it had loaded."""
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or (path.name.startswith("cache-") and path.suffix == ".arrow")


def _of_model_folder(folder: Path) -> str:
    if commit := commit_in(folder):
        return f"commit:{commit}"
    paths = {path for pattern in _OF_A_MODEL for path in folder.glob(pattern) if path.is_file()}
    return _hash({path.name: path for path in paths if path.name not in _NOT_OF_IT}, folder, _hash_in_a_model)


def _commit_of_model(name: str, revision: str | None) -> str | None:
    """The commit that would be loaded now; offline, that of the cache."""
    config_of(name, revision)  # which says in one sentence if there is no such model
    adapter = find_adapter_config_file(name, revision=revision)
    return commit_in(adapter or cached_file(name, CONFIG_NAME, revision=revision))


def _hash(files: dict[str, Path], what: str | Path, hash_of: Callable[[Path], str] | None = None) -> str:
    """Of names and the contents behind them; every byte counts."""
    size = sum(path.stat().st_size for path in files.values())
    if size > _SAID_FROM:
        print(f"Reading {what} ({size / 1e9:.0f} GB), to know it again ...", flush=True)
    names = sorted(files)
    with ThreadPoolExecutor() as threads:  # hashes are reckoned outside of Python's lock
        hashes = list(threads.map(hash_of or _hash_of, [files[name] for name in names]))
    return f"sha256:{_digest(list(zip(names, hashes, strict=True)))}"


def _hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_in_a_model(path: Path) -> str:
    """The same, but for a config's words about places and versions."""
    if not path.name.endswith("config.json"):
        return _hash_of(path)
    config = json.loads(path.read_text())
    return _digest({key: value for key, value in config.items() if key not in _SPELLINGS})


def _digest(value: list | dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
