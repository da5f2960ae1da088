"""Files of text and of JSON, gzipped or not: read as UTF-8, and what is wrong is named with its file and line."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path


def suffix_of(path: str | Path) -> str:
    """What a file is by its name: ".jsonl" of "a.jsonl.gz"."""
    return Path(Path(path).name.removesuffix(".gz")).suffix


def lines_of(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers, from 1, ends of lines as "\\n"; without a byte-order mark.

    Raises:
        ValueError: for bytes that are not UTF-8, and for a .gz that is none or is cut off.
    """
    number = 0
    with gzip.open(path) if Path(path).suffix == ".gz" else open(path, "rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                yield number, _decoded(line, path, number)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: can't be unzipped after line {number} ({error}). Get it anew.") from error


def text_of(path: str | Path) -> str:
    """All of a file. Raises what `lines_of` does."""
    return "".join(line for _, line in lines_of(path))


def is_empty(path: str | Path) -> bool:
    """Whether a file holds nothing. Raises what `lines_of` does of its first line."""
    return next(lines_of(path), None) is None


def rows_of(path: str | Path) -> Iterator[tuple[int, dict]]:
    """The JSON objects of a file, one a line, with the lines' numbers. A .json file may be one array of them instead.

    Raises:
        ValueError: for anything else, and what `lines_of` does.
    """
    if suffix_of(path) == ".json" and _first_character(path) == "[":
        for number, row in enumerate(_parsed(text_of(path), str(path), "The file has to be one array."), start=1):
            yield number, _object(row, f"{path}, row {number}")
        return
    for number, line in lines_of(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield number, _object(_parsed(line, where, "Each line has to be one JSON object."), where)


def is_whole(text: str) -> bool:
    """Whether no character of a text is half of one: JSON can say so ("\\ud83d"), a tokenizer can't read it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decoded(line: bytes, path: str | Path, number: int) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: its byte {error.start + 1}, {line[error.start]:#04x}, is not UTF-8. Save the "
            "file as UTF-8."
        ) from error
    if number == 1:
        text = text.removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _first_character(path: str | Path) -> str:
    return next((line.lstrip()[0] for _, line in lines_of(path) if line.strip()), "")


def _parsed(text: str, where: str, expected: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}). {expected}") from error


def _object(row, where: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__} where a JSON object is expected.")
    return row
