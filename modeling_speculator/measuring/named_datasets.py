"""Datasets by name, of a folder or of the Hub; what is wrong with one is said in one line."""

import dataclasses
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets

from .text_files import suffix_of


# What every folder has for itself; the types of columns (`features`) are seen in the rows, too.
_NO_OPTIONS = {"name", "version", "data_dir", "data_files", "description", "features"}


def files_of_folder(folder: str, config: str | None, split: str, suffixes: Collection[str]) -> list[str]:
    """The files of a split, as `datasets` tells them by their names or by the folder's card.

    None of what is not a folder, or has files of other suffixes, or a card with options for reading them: all that
    is for `load_split`.

    Raises:
        ValueError: if the folder has no data, or no such configuration.
    """
    if not Path(folder).is_dir() or _is_saved(folder):
        return []
    with in_one_line(folder):
        options = datasets.load_dataset_builder(folder, config).config
    files = [path for name, paths in (options.data_files or {}).items() if str(name) == split for path in paths]
    is_known = all(suffix_of(path) in suffixes for path in files)
    return files if is_known and not _has_options(options) else []


def load_split(
    name: str,
    config: str | None,
    split: str,
    revision: str | None = None,
    streaming: bool = False,
    text_by: str = "line",
) -> datasets.Dataset | datasets.IterableDataset:
    """Loads a dataset of the Hub or of a folder, one that `save_to_disk` wrote, too.

    Args:
        text_by: what of a text file is a row, "line" or "document", unless the dataset's card says it.

    Raises:
        ValueError: if there is no such dataset, configuration or split, or it can't be read.
    """
    with in_one_line(name):
        if _is_saved(name):
            return _load_saved(name, split, streaming)
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        options = {"sample_by": text_by} if builder.name == "text" and not _has_options(builder.config) else {}
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming, **options)


@contextmanager
def in_one_line(name: str) -> Iterator[None]:
    """Raises what `datasets` and pyarrow raise of a file or a dataset as a ValueError of one line that names it."""
    try:
        yield
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{name}: {_line(error.__cause__ or error)}") from error
    except OSError as error:  # not found or not reached, here and on the Hub
        raise ValueError(f"{name}: {_why_not_found(name, error)} ({_line(error)})") from error
    except (ValueError, RuntimeError) as error:  # no such configuration or split, broken files, a loading script
        raise ValueError(f"{name}: {_line(error)}") from error


def _why_not_found(name: str, error: OSError) -> str:
    if Path(name).is_dir():
        return "this folder has no data that `datasets` can read"
    if Path(name).exists():
        return "this is a file, not a folder or a dataset of the Hub"
    asked = "gives no such dataset" if isinstance(error, FileNotFoundError) else "could not be asked"
    return f"there is no file or folder of this name, and the Hub {asked}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _has_options(config: datasets.BuilderConfig) -> bool:
    """Whether a card says how the files are to be read."""
    usual = type(config)()
    names = {field.name for field in dataclasses.fields(config)} - _NO_OPTIONS
    return any(getattr(config, name) != getattr(usual, name) for name in names)


def _is_saved(folder: str) -> bool:
    """Whether `save_to_disk` wrote it."""
    return any((Path(folder) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _load_saved(folder: str, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    rows = datasets.load_from_disk(folder)
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise ValueError(f"it has no split {split!r}, only {sorted(rows)}.")
        rows = rows[split]
    return rows.to_iterable_dataset() if streaming else rows
