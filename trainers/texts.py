"""What is trained on, as it is found: rows of files, of folders, of datasets of the Hub; loaded or streamed."""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
from pyarrow import parquet

from ..measuring.named_datasets import files_of_folder, in_one_line, load_split
from ..measuring.text_files import is_empty, rows_of, suffix_of, text_of
from .documents import WHERE, warn
from .training_args import DataArguments


KINDS = {".txt": "text", ".py": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class FileRows:
    """Rows of text or JSON files, in order, read anew each time.

    Args:
        files: (path, bytes, time of the last change) of each; a file that was changed makes other rows.
        column: of the JSON objects.
    """

    files: tuple[tuple[str, int, int], ...]
    column: str

    def __iter__(self) -> Iterator[dict]:
        return read_rows([path for path, _, _ in self.files], self.column)


Texts = FileRows | datasets.Dataset | datasets.IterableDataset


def load_texts(data: DataArguments) -> Texts:
    """Finds a dataset of the Hub or of a folder, or files. A text file is one document.

    Returns:
        Rows with `text_column` and nothing else, but where it stands (`WHERE`) in a text or JSON file; a row of those
        that lacks the column has its others, to be named. Of a stream, a `datasets.IterableDataset`.

    Raises:
        ValueError: unless exactly one source is named; for a source that is missing, empty, broken or of unknown kind.
    """
    if data.prompts is not None:
        raise ValueError("Whole `prompts` are for stage 2, in place of a `dataset` and `data_files`.")
    if (data.dataset is None) == (data.data_files is None):
        raise ValueError(
            f"Name a `dataset` or `data_files`, one of both; got {data.dataset!r} and {data.data_files!r}."
        )
    if data.data_files is not None:
        return _of_files(matching_files(data.data_files), data)
    if Path(data.dataset).is_file():
        raise ValueError(f"`dataset: {data.dataset}` is a file: name it as `data_files`.")
    files = files_of_folder(data.dataset, data.dataset_config, data.dataset_split, KINDS)
    if files and len({KINDS[suffix_of(path)] for path in files}) == 1:
        return _of_files(files, data)
    rows = load_split(
        data.dataset, data.dataset_config, data.dataset_split, data.dataset_revision, data.streaming, "document"
    )
    if rows.column_names is None:  # of some streams; they are looked for in each row
        return rows
    check_column(rows.column_names, data.text_column, data.dataset)
    return rows.select_columns([data.text_column])


def read_rows(paths: list[str], column: str) -> Iterator[dict]:
    """Rows of text or JSON files, with what `column` holds and where it stands."""
    for path in paths:
        if KINDS[suffix_of(path)] == "text":
            yield {"text": text_of(path), WHERE: (path, 1)}
        else:
            for number, row in rows_of(path):
                yield ({column: row[column]} if column in row else row) | {WHERE: (path, number)}


def matching_files(patterns: list[str]) -> list[str]:
    """The files that names or patterns stand for, each once; a ValueError where one stands for none."""
    found = {}
    for pattern in patterns:
        matches = [path for path in sorted(glob.glob(pattern, recursive=True)) if Path(path).is_file()]
        if not matches and Path(pattern).is_dir():
            raise ValueError(f"`data_files: {pattern}` is a folder: name it as `dataset`, or the files in it.")
        if not matches:
            raise ValueError(f"`data_files` that don't exist: {pattern}.")
        for path in matches:
            found.setdefault(Path(path).resolve(), path)
    return list(found.values())


def _of_files(paths: list[str], data: DataArguments) -> Texts:
    kinds = {KINDS.get(suffix_of(path)) for path in paths}
    if len(kinds) != 1 or None in kinds:
        examples = sorted({suffix_of(path): path for path in paths}.values())
        raise ValueError(f"`data_files` must be of one kind, of {sorted(KINDS)}; got {examples}.")
    if kinds == {"parquet"}:
        return _of_parquet(paths, data)
    empty = [path for path in paths if is_empty(path)]
    if len(empty) == len(paths):
        raise ValueError(f"{', '.join(empty)}: holds nothing to train on.")
    if empty:
        warn(f"{len(empty)} of {len(paths)} files hold nothing: {', '.join(empty)}.")
    if data.streaming:
        return datasets.IterableDataset.from_generator(
            read_rows, gen_kwargs={"paths": paths, "column": data.text_column}
        )
    stats = [Path(path).stat() for path in paths]
    files = tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True))
    return FileRows(files, data.text_column)


def _of_parquet(paths: list[str], data: DataArguments) -> datasets.Dataset | datasets.IterableDataset:
    for path in paths:
        with in_one_line(path):
            columns = parquet.read_schema(path).names
        check_column(columns, data.text_column, path)
    with in_one_line(", ".join(paths)):
        return datasets.load_dataset(
            "parquet", data_files=paths, split="train", streaming=data.streaming, columns=[data.text_column]
        )


def check_column(columns: list[str], column: str, source: str) -> None:
    """Raises a ValueError that names the columns that there are."""
    if column not in columns:
        raise ValueError(f"{source} has no column {column!r}, only {columns}: set `text_column`.")
