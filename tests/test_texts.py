"""What is trained on: files, folders and datasets, loaded and streamed alike, and what is said of bad ones."""

import gzip
import json
import logging

import datasets
import pytest

from modeling_speculator.trainers import DataArguments, load_texts


@pytest.fixture(params=[False, True], ids=["loaded", "streamed"])
def load(request):
    """Loads the texts of a source, all of them."""

    def load_(**source) -> list:
        arguments = DataArguments(streaming=request.param, **source)
        return [row[arguments.text_column] for row in load_texts(arguments)]

    return load_


def save(path, *documents):
    kind = path.name.split(".")[1]
    if kind == "parquet":
        datasets.Dataset.from_dict({"text": list(documents)}).to_parquet(path)
        return
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    content = documents[0] if kind in ("txt", "py") else lines
    path.write_bytes(gzip.compress(content.encode(), mtime=0) if path.suffix == ".gz" else content.encode())


SUFFIXES = ["txt", "txt.gz", "py", "jsonl", "jsonl.gz", "json", "parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files(tmp_path, load, suffix):
    for number, text in enumerate(["a text\nof two lines", "another"]):
        save(tmp_path / f"{number}.{suffix}", text)
    assert load(data_files=[str(tmp_path / f"*.{suffix}")]) == ["a text\nof two lines", "another"]


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "jsonl", "parquet"])
def test_a_folder_is_read_as_its_files_are(tmp_path, load, suffix):
    """One document a text file, in sub-folders too; the folder's card and other files are none."""
    (tmp_path / "more").mkdir()
    (tmp_path / "README.md").write_text("# Texts")
    (tmp_path / "LICENSE").write_text("Free.")
    save(tmp_path / f"a.{suffix}", "a text\nof two lines")
    save(tmp_path / f"more/b.{suffix}", "another")
    assert load(dataset=str(tmp_path)) == ["a text\nof two lines", "another"]
    assert load(dataset=str(tmp_path)) == load(data_files=[str(tmp_path / f"**/*.{suffix}")])


def test_splits_of_a_folder(tmp_path, load):
    for split in ("train", "test"):
        save(tmp_path / f"{split}.txt", f"for\n{split}")
    assert load(dataset=str(tmp_path)) == ["for\ntrain"]
    assert load(dataset=str(tmp_path), dataset_split="test") == ["for\ntest"]
    with pytest.raises(ValueError, match=f"{tmp_path.name}: .*split.*'train'"):
        load(dataset=str(tmp_path), dataset_split="validation")
    with pytest.raises(ValueError, match=f"{tmp_path.name}: .*'french' not found"):
        load(dataset=str(tmp_path), dataset_config="french")


def test_a_card_says_how_its_files_are_read(tmp_path, load):
    save(tmp_path / "a.txt", "one\n\ntwo\nlines")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: '*.txt'\n  sample_by: paragraph\n---\n"
    )
    assert load(dataset=str(tmp_path)) == ["one", "two\nlines"]


def test_what_save_to_disk_wrote(tmp_path, load):
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "other": [1, 2]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    rows.save_to_disk(tmp_path / "one")
    assert load(dataset=str(tmp_path / "splits")) == load(dataset=str(tmp_path / "one")) == ["a", "b"]
    with pytest.raises(ValueError, match=r"splits: it has no split 'test', only \['train'\]"):
        load(dataset=str(tmp_path / "splits"), dataset_split="test")
    with pytest.raises(ValueError, match=r"no column 'body', only \['text', 'other'\]: set `text_column`"):
        load(dataset=str(tmp_path / "one"), text_column="body")


def test_other_columns_may_differ(tmp_path, load):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "meta": {"source": 1}}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b", "meta": "web", "score": 2}\n{"score": "x", "text": "c"}\n')
    assert load(data_files=[str(tmp_path / "*.jsonl")]) == ["a", "b", "c"]
    assert load(dataset=str(tmp_path)) == ["a", "b", "c"]
    for name, numbers in (("a", [1]), ("b", ["x"])):
        rows = datasets.Dataset.from_dict({"text": [name], "score": numbers})
        rows.to_parquet(tmp_path / f"{name}.parquet")
    assert load(data_files=[str(tmp_path / "*.parquet")]) == ["a", "b"]


def test_a_file_that_two_patterns_match_is_read_once(tmp_path, load):
    for name in ("a", "b"):
        save(tmp_path / f"{name}.txt", name)
    (tmp_path / "c.txt").mkdir()  # a pattern stands for files
    assert load(data_files=[str(tmp_path / "b.txt"), str(tmp_path / "*.txt")]) == ["b", "a"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "jsonl.gz"])
def test_files_that_hold_nothing(tmp_path, load, caplog, suffix):
    empty = tmp_path / f"a.{suffix}"
    empty.write_bytes(gzip.compress(b"", mtime=0) if suffix.endswith("gz") else b"")
    with pytest.raises(ValueError, match=f"a.{suffix}: holds nothing to train on"):
        load(data_files=[str(empty)])
    save(tmp_path / f"b.{suffix}", "text")
    with caplog.at_level(logging.WARNING):
        texts = load(data_files=[str(tmp_path / f"*.{suffix}")])
    assert "text" in texts
    assert f"1 of 2 files hold nothing: {empty}." in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"a\ncaf\xe9\n", "a.txt, line 2: its byte 4, 0xe9, is not UTF-8"),
        ("a.py", b"# caf\xe9\n", "a.py, line 1: its byte 6, 0xe9, is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "a.jsonl, line 2: its byte 14, 0xe9, is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', "a.jsonl, line 2: not JSON"),
        ("a.jsonl.gz", b'{"text": "a"}\n', "a.jsonl.gz: can't be unzipped"),
        ("a.txt.gz", gzip.compress(b"a text that is cut off", mtime=0)[:-12], "a.txt.gz: can't be unzipped"),
        ("a.parquet", b"no parquet, but long enough", "a.parquet: Parquet magic bytes not found"),
        ("a.docx", b"", r"must be of one kind, of \['.json', .*a.docx"),
        ("a.parquet.gz", gzip.compress(b"a", mtime=0), "a.parquet.gz: Parquet magic bytes not found"),
    ],
)
def test_files_that_are_broken(tmp_path, load, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load(data_files=[str(tmp_path / name)])
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_not_part_of_a_text(tmp_path, load):
    for suffix in ("txt", "py", "txt.gz", "jsonl", "json", "jsonl.gz"):
        for name in ("a", "b"):  # of each file, not of the first
            path = tmp_path / f"{name}.{suffix}"
            save(path, name)
            content = gzip.decompress(path.read_bytes()) if suffix.endswith("gz") else path.read_bytes()
            content = b"\xef\xbb\xbf" + content
            path.write_bytes(gzip.compress(content, mtime=0) if suffix.endswith("gz") else content)
        assert load(data_files=[str(tmp_path / f"*.{suffix}")]) == ["a", "b"]


def test_sources_that_are_not_there(tmp_path, load):
    with pytest.raises(ValueError, match="one of both"):
        load()
    with pytest.raises(ValueError, match="don't exist.*nowhere.txt"):
        load(data_files=[str(tmp_path / "nowhere.txt")])
    with pytest.raises(ValueError, match="is a folder: name it as `dataset`"):
        load(data_files=[str(tmp_path)])
    with pytest.raises(ValueError, match="this folder has no data"):
        load(dataset=str(tmp_path))
    save(tmp_path / "a.txt", "text")
    with pytest.raises(ValueError, match="a.txt` is a file: name it as `data_files`"):
        load(dataset=str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="must be of one kind"):
        save(tmp_path / "a.jsonl", "text")
        load(data_files=[str(tmp_path / "a.*")])


@pytest.mark.parametrize(
    ("name", "asked"),
    [("org/mistyped", "could not be asked"), ("mistyped", "could not be asked"), ("./mi/sty/ped", "gives no such")],
)
def test_a_mistyped_name_takes_one_line(load, name, asked):
    with pytest.raises(
        ValueError, match=f"^{name}: there is no file or folder of this name, and the Hub {asked}"
    ) as error:
        load(dataset=name)
    assert "\n" not in str(error.value)
