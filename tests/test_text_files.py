"""Files of text and JSON: what they hold, whatever writes them, and what is wrong with them, by file and line."""

import gzip
import json

import pytest

from modeling_speculator.measuring.text_files import is_empty, is_whole, lines_of, rows_of, suffix_of, text_of


@pytest.fixture(params=["", ".gz"])
def write(request, tmp_path):
    """A file, plain and gzipped."""

    def write_(name: str, content: bytes) -> str:
        path = tmp_path / f"{name}{request.param}"
        path.write_bytes(gzip.compress(content, mtime=0) if request.param else content)
        return str(path)

    return write_


def test_a_byte_order_mark_and_ends_of_lines_are_not_part_of_the_text(write):
    path = write("a.txt", "\ufeffone\r\ntwo\rthree\n\ufefffour".encode())
    assert suffix_of(path) == ".txt"
    assert text_of(path) == "one\ntwo\nthree\n\ufefffour"
    assert list(lines_of(write("b.txt", "\ufeffé\r\nb".encode()))) == [(1, "é\n"), (2, "b")]


def test_a_byte_that_is_not_utf_8_is_named(write):
    path = write("a.txt", "\ufefffine\ncaf".encode() + "é\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{path}, line 2: its byte 4, 0xe9, is not UTF-8"):
        text_of(path)
    with pytest.raises(ValueError, match="line 1: its byte 1, 0xff, is not UTF-8"):
        text_of(write("b.txt", "text".encode("utf-16")))


def test_objects_a_line_or_in_an_array(write):
    rows = [{"text": "a"}, {"text": "b", "other": [1]}]
    lines = "\ufeff" + "\n\n".join(json.dumps(row) for row in rows)
    for name in ("a.jsonl", "a.json"):
        assert list(rows_of(write(name, lines.encode()))) == [(1, rows[0]), (3, rows[1])]
    array = "\ufeff\n " + json.dumps(rows, indent=2)
    assert list(rows_of(write("b.json", array.encode()))) == [(1, rows[0]), (2, rows[1])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b', "line 2: not JSON.*Each line has to be one JSON object"),
        ("a.jsonl", '\n["a"]\n', "line 2: a list where a JSON object"),
        ("a.json", '[{"text": "a"}, 3]', "row 2: a int where a JSON object"),
        ("a.json", '[{"text": "a"},\n', "a.json.*: not JSON.*has to be one array"),
        ("a.json", '{"text":\n"a"}\n', "line 1: not JSON"),
    ],
)
def test_what_is_not_json_is_named(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        list(rows_of(write(name, content.encode())))


def test_archives_that_are_broken(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="a.jsonl.gz: can't be unzipped after line 0"):
        list(rows_of(path))
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % number for number in range(10_000)))
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"a.jsonl.gz: can't be unzipped after line \d{4}"):
        list(rows_of(path))
    path.write_bytes(whole[:2000] + bytes(100) + whole[2100:])
    with pytest.raises(ValueError, match="a.jsonl.gz: can't be unzipped after line"):
        list(rows_of(path))


def test_nothing_and_half_a_character(write):
    assert is_empty(write("a.txt", b""))
    assert not is_empty(write("b.txt", b"\n"))
    assert is_whole("dog \U0001f415")
    assert not is_whole(json.loads('"\\ud83d"'))
