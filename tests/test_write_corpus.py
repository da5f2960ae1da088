"""`recipes/quickstart/write_corpus.py`, as it is run from a terminal."""

import json
import runpy
import sys
import sysconfig
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "recipes/quickstart/write_corpus.py"


@pytest.fixture
def write_corpus(tmp_path, monkeypatch):
    """What is written to train on and held out."""

    def write_corpus_(*args) -> list[list[dict]]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output_dir", str(tmp_path / "corpus"), *map(str, args)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        written = [(tmp_path / "corpus" / f"{name}.jsonl").read_text() for name in ("train", "held_out")]
        return [[json.loads(line) for line in lines.splitlines()] for lines in written]

    return write_corpus_


def test_texts_are_split(tmp_path, write_corpus):
    rows = [{"text": f"text {number}"} for number in range(41)]
    texts = tmp_path / "texts.jsonl"
    texts.write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, rows)).encode())
    train, held_out = write_corpus("--texts", texts)
    assert held_out == [rows[0], rows[20], rows[40]]
    assert train == rows[1:20] + rows[21:40]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "texts.jsonl holds nothing to split"),
        (b'{"text": "a"}\n{"body": "b"}\n', r"texts.jsonl, line 2: `text` is missing or not a text.*\['body'\]"),
        (b'{"text": 3}\n', "texts.jsonl, line 1: `text` is missing or not a text"),
        (b'{"text": "caf\xe9"}\n', "texts.jsonl, line 1: its byte 14, 0xe9, is not UTF-8"),
    ],
)
def test_texts_that_are_bad_are_named(tmp_path, write_corpus, content, message):
    (tmp_path / "texts.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        write_corpus("--texts", tmp_path / "texts.jsonl")


def test_a_byte_order_mark_is_not_part_of_a_source_file(tmp_path, write_corpus, monkeypatch):
    (tmp_path / "library").mkdir()
    (tmp_path / "library/a.py").write_bytes(b"\xef\xbb\xbfimport b\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "library")})
    assert write_corpus() == [[], [{"file": "a.py", "text": "import b\n"}]]
