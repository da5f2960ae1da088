"""Prompt files, in the forms that they are published in, and what is wrong with others."""

import gzip
import json

import datasets
import pytest
from tiny_models import character_tokenizer, tiny_model

from modeling_speculator.measuring.prompts import (
    Prompt,
    check_context,
    cut_prompts,
    digest_of,
    encode,
    fitting_prompts,
    pad_left,
    prompts_of_lengths,
    read_prompts,
    too_long,
)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_forms(tmp_path):
    file = write(
        tmp_path / "all.jsonl",
        {"question_id": 1, "category": "stem", "turns": ["a", "b"]},
        {"question_id": 2, "category": "rag", "turns": ["c"], "reference": ["d"]},
        {"task_id": "HumanEval/0", "prompt": "def f():", "canonical_solution": "x", "test": "y", "entry_point": "f"},
        {"question": "1 + 1?", "answer": "#### 2"},
        {"task_id": 11, "prompt": "e", "category": "mine"},
        {"prompt": "f"},
    )
    assert [(prompt.turns, prompt.category, prompt.reference) for prompt in read_prompts(file)] == [
        (("a", "b"), "mt_bench", None),
        (("c",), "rag", None),
        (("def f():",), "humaneval", None),
        (("1 + 1?",), "gsm8k", "#### 2"),
        (("e",), "mine", None),
        (("f",), "", None),
    ]
    zipped = tmp_path / "all.jsonl.gz"
    zipped.write_bytes(gzip.compress((tmp_path / "all.jsonl").read_bytes()))
    assert [prompt.turns for prompt in read_prompts(str(zipped))] == [prompt.turns for prompt in read_prompts(file)]


def test_plain_text_and_a_dataset(tmp_path):
    (tmp_path / "prompts.txt").write_text("one \n\n  two\n")
    assert [prompt.turns for prompt in read_prompts(str(tmp_path / "prompts.txt"))] == [("one ",), ("  two",)]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"prompt": ["x", "y"]}).to_parquet(tmp_path / "data/test-0.parquet")
    assert [prompt.turns for prompt in read_prompts(str(tmp_path / "data"))] == [("x",), ("y",)]
    with pytest.raises(ValueError, match="validation"):
        read_prompts(f"{tmp_path / 'data'}::validation")
    for config in ("main", "other"):
        (tmp_path / "two" / config).mkdir(parents=True)
        rows = datasets.Dataset.from_dict({"question": [config], "answer": ["1"]})
        rows.to_parquet(tmp_path / "two" / config / "train-0.parquet")
    configs = "".join(f"- config_name: {config}\n  data_files: {config}/*\n" for config in ("main", "other"))
    (tmp_path / "two/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert [prompt.turns for prompt in read_prompts(f"{tmp_path / 'two'}:other:train")] == [("other",)]


def test_a_limit_is_spread_evenly(tmp_path):
    file = write(tmp_path / "p.jsonl", *({"prompt": str(n)} for n in range(10)))
    assert [prompt.turns for prompt in read_prompts(file, 4)] == [("0",), ("2",), ("5",), ("7",)]
    assert len(read_prompts(file, 99)) == 10
    with pytest.raises(ValueError, match="`limit` must be at least 1, but is 0"):
        read_prompts(file, 0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "a.jsonl holds no prompts"),
        ("a.txt", "\n \n", "a.txt holds no prompts"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", '["x"]\n', "line 1: a list where a JSON object"),
        ("a.jsonl", '{"text": "x"}\n\n{"body": "x", "id": 3}\n', r"line 3: of unknown form, with \['body', 'id'\]"),
        ("a.jsonl", '{"prompt": "  "}\n', "line 1: prompts have to be texts that are not empty"),
        ("a.jsonl", '{"prompt": "\\ud83d"}\n', "line 1: prompts have to be texts"),
        ("a.jsonl", '{"turns": []}\n', "line 1: prompts have to be texts"),
        ("a.jsonl", '{"turns": "x"}\n', "line 1: prompts have to be texts"),
        ("a.csv", "prompt\nx\n", "not from '.csv'"),
        ("a.json", '[{"prompt": "x"}, {"body": "y"}]', r"a.json, row 2: of unknown form, with \['body'\]"),
        ("a.jsonl.gz", '{"prompt": "x"}\n', "a.jsonl.gz: can't be unzipped"),
        ("a.txt", "fine\ncaf\xe9\n", "a.txt, line 2: its byte 4, 0xe9, is not UTF-8"),
        ("a.jsonl", '{"prompt": "caf\xe9"}\n', "a.jsonl, line 1: its byte 16, 0xe9, is not UTF-8"),
    ],
)
def test_what_is_wrong(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.jsonl.gz"])
def test_a_byte_order_mark_is_not_part_of_a_prompt(tmp_path, name):
    content = b"\xef\xbb\xbf" + (b"say\xc3\xa9\r\n" if ".txt" in name else '{"prompt": "sayé"}\n'.encode())
    (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    assert [prompt.turns for prompt in read_prompts(str(tmp_path / name))] == [("sayé",)]


def test_a_folder_is_read_as_its_files_are(tmp_path):
    write(tmp_path / "array.json", [{"prompt": "a"}, {"prompt": "b"}])
    (tmp_path / "test.txt").write_text("one\n\n  two\n")
    assert [prompt.turns for prompt in read_prompts(str(tmp_path / "array.json"))] == [("a",), ("b",)]
    (tmp_path / "array.json").unlink()
    assert read_prompts(str(tmp_path)) == read_prompts(str(tmp_path / "test.txt"))
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"prompt": ["x"]})}).save_to_disk(tmp_path / "saved")
    (prompt,) = read_prompts(str(tmp_path / "saved"))
    assert (prompt.turns, prompt.where) == (("x",), f"{tmp_path / 'saved'}, row 1")


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        read_prompts(str(tmp_path / "prompts.jsonl"))
    message = "there is no file or folder of this name, and the Hub could not be asked"
    with pytest.raises(ValueError, match=message) as error:
        read_prompts("org/mistyped")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="this folder has no data that `datasets` can read"):
        read_prompts(str(tmp_path))
    (tmp_path / "train.txt").write_text("one")
    with pytest.raises(ValueError, match="split.*train"):
        read_prompts(str(tmp_path))


def test_the_benchmarks_themselves(shared):
    """As they are downloaded."""
    sizes = {"spec_bench_question.jsonl": 480, "HumanEval.jsonl.gz": 164, "gsm8k_test.jsonl": 1319}
    for name, size in sizes.items():
        prompts = read_prompts(str(shared / "data/prompts" / name))
        assert len(prompts) == size
        tasks = {prompt.category for prompt in prompts}
        if name.startswith("spec_bench"):
            assert tasks == {"mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag"}
            assert sum(len(prompt.turns) == 2 for prompt in prompts) == 80
        else:
            assert tasks == {"gsm8k" if name.startswith("gsm8k") else "humaneval"}


def test_turns_and_answers():
    tokenizer = character_tokenizer(eos_token="z")
    prompts = [Prompt("", ("ab", "cd")), Prompt("", ("ef",))]
    decode = tokenizer.decode
    plain = encode(prompts[:1], [["gh"]], tokenizer)
    assert plain == tokenizer(["ab\ngh\ncd"])["input_ids"]
    assert encode(prompts, [[], []], tokenizer) == tokenizer(["ab", "ef"])["input_ids"]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    (row,) = encode(prompts[:1], [["gh"]], tokenizer, chat=True)
    assert decode(row).replace(" ", "") == "uabaghucda"


def test_lengths():
    prompts = [Prompt("a.txt, line 1", ("a",)), Prompt("a.txt, line 7", ("a" * 130,)), Prompt("", ("bc",))]
    model, tokenizer = tiny_model("llama"), character_tokenizer(eos_token="z")
    model.config.max_position_embeddings = 128
    assert too_long(prompts[0], [1] * 123, model, 5) is None
    assert "line 1: a prompt of 124 tokens and 5 new" in too_long(prompts[0], [1] * 124, model, 5)
    assert "line 1: a prompt of no tokens" in too_long(prompts[0], [], model, 5)
    with pytest.raises(ValueError, match="line 7: a prompt of 130 tokens"):
        fitting_prompts(prompts, tokenizer, model, 5, chat=False, leave_out=False)
    assert fitting_prompts(prompts, tokenizer, model, 5, chat=False, leave_out=True) == [prompts[0], prompts[2]]
    with pytest.raises(ValueError, match="None of the 1 prompts leaves room for 5 new tokens"):
        fitting_prompts(prompts[1:2], tokenizer, model, 5, chat=False, leave_out=True)
    check_context(model, 128)
    with pytest.raises(ValueError, match="129 in all, are more than the 128 positions"):
        check_context(model, 129)
    input_ids, mask = pad_left([[1, 2, 3], [4]], 9)
    assert (input_ids.tolist(), mask.tolist()) == ([[1, 2, 3], [9, 9, 4]], [[1, 1, 1], [0, 0, 1]])
    assert digest_of(prompts) != digest_of(prompts[:2])


def test_prompts_cut_from_texts():
    """Of every length from the same texts, up to the same token; what begins a text begins its prompts."""
    texts = [[0, *range(10, 20)], [*range(30, 41)], [1, 2]]
    assert cut_prompts(texts, 4, 2).tolist() == [[12, 13, 14, 15], [33, 34, 35, 36]]
    assert cut_prompts(texts, 4, 2, bos_token_id=0).tolist() == [[0, 13, 14, 15], [33, 34, 35, 36]]
    assert cut_prompts(texts, 8, 2, longest=8)[:, -4:].tolist() == cut_prompts(texts, 4, 2, longest=8).tolist()
    assert cut_prompts(texts, 2, 3).shape == (3, 2)
    with pytest.raises(ValueError, match="Only 2 of 3 prompts have 4 tokens, where 3 are needed"):
        cut_prompts(texts, 4, 3)


def test_prompts_of_several_lengths():
    tokenizer = character_tokenizer()
    texts = ["abcdefghijkl", "abc", "mnopqrstuv", "bcdefghijk"]
    prompts = [Prompt(f"line {number}", (text,)) for number, text in enumerate(texts)]
    cut = prompts_of_lengths(prompts, [2, 8], tokenizer, limit=2)
    assert [prompt.category for prompt in cut] == ["2 tokens", "2 tokens", "8 tokens", "8 tokens"]
    rows = encode(cut, [[] for _ in cut], tokenizer)
    assert [len(row) for row in rows] == [2, 2, 8, 8]
    assert rows[0] == rows[2][-2:] == tokenizer("ij")["input_ids"] and rows[1] == rows[3][-2:]
    assert len(prompts_of_lengths(prompts, [2, 8], tokenizer)) == 6
    with pytest.raises(ValueError, match="No prompt has 13 tokens: the longest has 12"):
        prompts_of_lengths(prompts, [2, 13], tokenizer)
