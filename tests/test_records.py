"""Records on disk: none is lost, none is of other settings."""

import pytest

from modeling_speculator.measuring.records import RecordFile


def test_what_was_written_is_there_again(tmp_path):
    path = tmp_path / "new/a.jsonl"
    first = RecordFile(path, {"k": (1, 2)})
    first.add([{"a": 1}, {"a": 2}])
    first.add([{"a": 3}])
    again = RecordFile(path, {"k": [1, 2]})
    assert again.records == first.records == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    RecordFile(path, {}).add([{"a": 1}, {"a": 2}])
    path.write_text(path.read_text()[:-4])
    again = RecordFile(path, {})
    assert again.records == [{"a": 1}]
    again.add([{"a": 3}])
    assert RecordFile(path, {}).records == [{"a": 1}, {"a": 3}]
    path.write_text('{"set')  # killed while the settings were written
    assert RecordFile(path, {"k": 1}).records == []


def test_other_settings(tmp_path):
    RecordFile(tmp_path / "a.jsonl", {"k": 0})  # nothing was measured with these
    RecordFile(tmp_path / "a.jsonl", {"k": 1, "same": 0}).add([{}])
    with pytest.raises(ValueError, match="was measured with k=1, not k=2. Take another folder"):
        RecordFile(tmp_path / "a.jsonl", {"k": 2, "same": 0})
