"""Documents: texts and conversations, row by row; those that can't be read are counted, told of, and never most."""

import itertools
import json

import datasets
import pytest
import torch
from tiny_models import word_tokenizer

from modeling_speculator.trainers import DataArguments, load_rows, pack


END, USER, ASSISTANT = 100, 91, 92
CHAT = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]
SHARE_GPT = [{"from": "human", "value": "1 2"}, {"from": "gpt", "value": "3"}]
WRITTEN = [USER, 1, 2, ASSISTANT, 3, END]
TEMPLATE = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must\nalternate') }}{% endif %}{% if message.content != 'nothing' %}"
    "{{ 91 if message.role == 'user' else 92 }} {{ message.content + ' ' }}{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer():
    tokenizer = word_tokenizer([*map(str, range(100)), "</s>"], eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def train_on(tmp_path, tokenizer):
    """The sequences of 6 tokens of a jsonl file with these values: all of them, or the first 20 of a stream."""

    def train_on_(*values, column: str = "messages", streaming: bool = False) -> list[list[int]]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({column: value, "id": 0}) + "\n" for value in values))
        data = DataArguments(data_files=[str(path)], text_column="messages", streaming=streaming, sequence_length=6)
        data.validation_fraction = 0
        rows, _ = load_rows(data, tokenizer)
        return [row["input_ids"] for row in itertools.islice(rows, 20 if streaming else None)]

    return train_on_


BOTH = pytest.mark.parametrize("streaming", [False, True])


@pytest.mark.parametrize("messages", [CHAT, SHARE_GPT])
def test_conversations_are_written_by_the_chat_template(tokenizer, messages):
    rows = pack(datasets.Dataset.from_dict({"messages": [messages]}), tokenizer, 6, text_column="messages")
    assert rows["input_ids"][:] == [WRITTEN]


@BOTH
def test_a_base_model_without_a_chat_template(tokenizer, train_on, streaming):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        train_on("1 2 3", CHAT, streaming=streaming)


def test_texts_and_conversations_row_by_row(train_on):
    assert train_on("1 2 3 4 5", CHAT, CHAT, "5 4 3 2 1", None, "", CHAT) == [
        [1, 2, 3, 4, 5, END],
        WRITTEN,
        WRITTEN,
        [5, 4, 3, 2, 1, END],
        WRITTEN,
    ]


def said(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (CHAT[::-1], "is refused by the chat template: Roles must alternate"),
        ([said("user", "1"), said("user", "2")], "is refused by the chat template: Roles must alternate"),
        ([said("observer", "1"), said("assistant", "2")], "is refused by the chat template: Roles must alternate"),
        ([said("user", "1"), said("assistant", None)], "has a message without `content`"),
        ([said("user", "1"), said("assistant", 2)], "has a message whose `content` is a number"),
        ([{"content": "1"}], "has a message without `role`"),
        ([said("user", "nothing")], "is a conversation of which the chat template writes nothing"),
        ([{"from": "tool", "value": "1"}], "has a message from 'tool', not from one of"),
        ([{"from": ["gpt"], "value": "1"}], "has a message from"),
        ([], "is a conversation without messages"),
        (["1", "2"], "is a list of which a part is a text, not a message"),
        ({"role": "user", "content": "1"}, "is an object, neither a text nor a list of messages"),
        (3, "is a number, neither a text nor a list of messages"),
        (True, "is a truth value, neither"),
        ("1 \ud83d", "has half of a character"),
        ([said("user", "1 \ud83d")], "has half of a character"),
    ],
)
def test_a_row_that_can_not_be_read_is_left_out_and_told_of(train_on, caplog, value, problem):
    assert train_on(CHAT, value, CHAT) == [WRITTEN, WRITTEN]
    (told,) = caplog.messages
    assert told.startswith(
        f"1 of 3 rows can't be trained on, and are left out. The first: row 2's `messages` {problem}"
    )
    assert told.endswith("rows.jsonl).")
    assert "\n" not in told


@BOTH
def test_where_all_rows_are_bad_the_run_stops(train_on, streaming):
    with pytest.raises(ValueError, match=r"^3 of 3 rows.* row \d's `messages` is refused by the chat template"):
        train_on(*[CHAT[::-1]] * 3, streaming=streaming)
    with pytest.raises(ValueError, match=r"^1 of 1 rows.* row 1's `messages` is a number"):
        train_on(1, streaming=streaming)
    with pytest.raises(ValueError, match=r"row 1's `messages` is missing: it has only \['body', 'id'\].*text_column"):
        train_on("1 2 3", column="body", streaming=streaming)
    with pytest.raises(ValueError, match="texts"):
        train_on("", None, streaming=streaming)


@BOTH
def test_half_of_the_rows_is_enough(train_on, streaming):
    values = [CHAT, 1, 2, CHAT] * 50
    assert train_on(*values, streaming=streaming)[:20] == [WRITTEN] * 20
    with pytest.raises(ValueError, match="101 of 201 rows"):
        train_on(*values, 3, streaming=streaming)


def test_most_rows_being_bad_is_seen_before_the_end(tokenizer):
    """Of data without an end, too; but the first rows alone are no proof."""

    def stream(n_bad):
        yield from itertools.repeat({"messages": 1}, n_bad)
        yield from itertools.repeat({"messages": CHAT})

    for n_bad in (499, 1001):
        texts = datasets.IterableDataset.from_generator(stream, gen_kwargs={"n_bad": n_bad})
        rows = pack(texts, tokenizer, 6, text_column="messages")
        if n_bad == 499:
            assert [row["input_ids"] for row in rows.take(2)] == [WRITTEN] * 2
        else:
            with pytest.raises(ValueError, match="1000 of 1000 rows so far.*row 1's `messages` is a number"):
                next(iter(rows))


def test_what_was_left_out_is_told_on_each_run(tokenizer, caplog):
    """`datasets` keeps the sequences of the first."""
    texts = datasets.Dataset.from_dict({"messages": [CHAT] * 8 + [CHAT[::-1]] * 5})
    made = []
    for _ in range(2):
        caplog.clear()
        rows = pack(texts, tokenizer, 6, text_column="messages")
        made.append(rows.cache_files)
        assert rows["input_ids"][:] == [WRITTEN] * 8
        assert [message[:13] for message in caplog.messages] == ["5 of 13 rows "]
        assert "row 9's `messages` is refused by the chat template" in caplog.text
        assert '([{"role": "assistant", "content": "3"}' in caplog.text  # which it is, where there is no file
    assert made[0] == made[1]


def test_a_stream_tells_neither_nothing_nor_all(tokenizer, caplog):
    values = [CHAT, CHAT[::-1]] * 150
    texts = datasets.Dataset.from_dict({"messages": values}).to_iterable_dataset()
    rows = pack(texts, tokenizer, 6, text_column="messages")
    first = list(rows.take(20))
    told = [message.split(" can't")[0] for message in caplog.messages]
    assert [int(message.split(" of ")[0]) for message in told] == [1, 10, 100]
    assert list(rows.take(20)) == first  # after a restart, the same


def test_what_a_stream_holds_out_is_counted_by_rows_read(tokenizer, tmp_path):
    """Rows that were left out before the last held-out one are not read again."""
    numbers = [f"{n} {n} {n} {n} {n}" for n in range(20)]
    path = tmp_path / "rows.jsonl"
    values = [numbers[0], 7, numbers[1], *numbers[2:]]
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    data = DataArguments(data_files=[str(path)], streaming=True, sequence_length=6, validation_sequences=2)
    train, held_out = load_rows(data, tokenizer)
    assert [row["input_ids"][0] for row in held_out] == [0, 1]
    assert {row["input_ids"][0] for row in train.take(18)} == set(range(2, 20))


def test_one_process_of_a_launch_tells(tokenizer, caplog, monkeypatch):
    texts = datasets.Dataset.from_dict({"messages": [CHAT, [], CHAT]})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, n_told in ((1, 0), (0, 1)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        pack(texts, tokenizer, 6, text_column="messages")
        assert len(caplog.messages) == n_told
