"""Data: how they are packed, what is held out, and that order never depends on luck."""

import itertools
from pathlib import Path

import datasets
import pytest
import torch
from tiny_models import tiny_model, word_tokenizer

from modeling_speculator.trainers import DataArguments, load_rows, load_texts, pack, split
from modeling_speculator.trainers.base_model import check_separation, read


END = 100


@pytest.fixture
def tokenizer():
    return word_tokenizer([*map(str, range(100)), "</s>"], eos_token="</s>")


def texts(*documents):
    return datasets.Dataset.from_dict({"text": list(documents)})


def numbers(first, n):
    return " ".join(str(number % 100) for number in range(first, first + n))


def test_texts_are_joined_with_the_end_token(tokenizer):
    data = datasets.Dataset.from_dict({"body": ["1 2 3", "4 5 6 7", "8"]})
    rows = pack(data, tokenizer, 4, text_column="body", separate_documents=False)
    assert rows["input_ids"][:] == [[1, 2, 3, END], [4, 5, 6, 7]]
    assert rows.column_names == ["input_ids"]


def test_positions_start_again_with_each_document_and_each_row(tokenizer):
    rows = pack(texts("1 2", "3 4 5 6 7 8", "9"), tokenizer, 6)
    assert rows["input_ids"][:] == [[1, 2, END, 3, 4, 5], [6, 7, 8, END, 9, END]]
    assert rows["position_ids"][:] == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]]


def test_nothing_is_wasted(tokenizer):
    """Over more texts than are tokenized at once: every token but an incomplete last row."""
    documents = [numbers(n, n % 13) for n in range(2500)]
    rows = pack(texts(*documents), tokenizer, 64)
    expected = [token for text in documents if text for token in [*map(int, text.split()), END]]
    assert list(itertools.chain(*rows["input_ids"])) == expected[: len(expected) // 64 * 64]


def test_a_text_that_ends_already_gets_no_second_end(tokenizer):
    assert pack(texts("1 2 </s>", "3"), tokenizer, 5)["input_ids"][:] == [[1, 2, END, 3, END]]


def test_texts_too_short_for_a_sequence(tokenizer):
    with pytest.raises(ValueError, match="fewer tokens than one sequence of 64.*sequence_length"):
        pack(texts("1 2 3"), tokenizer, 64)
    with pytest.raises(ValueError, match="0 texts hold fewer tokens"):
        pack(texts(), tokenizer, 64)
    with pytest.raises(ValueError, match="no column 'body'.*text_column"):
        pack(texts("1 2 3"), tokenizer, 2, text_column="body")


def test_split_holds_out_the_last_rows():
    rows = datasets.Dataset.from_dict({"input_ids": [[n] for n in range(10)]})
    train, validation = split(rows, 0.2)
    assert train["input_ids"][:] == [[n] for n in range(8)]
    assert validation["input_ids"][:] == [[8], [9]]
    assert split(rows, 0.5, 3)[1]["input_ids"][:] == [[7], [8], [9]]
    assert split(rows, 0)[1] is None
    with pytest.raises(ValueError, match="nothing to train on"):
        split(rows, 1.0)


@pytest.fixture
def stream(tmp_path):
    """Three files of texts: document n is the number n, n % 7 + 1 times."""
    for file in range(3):
        documents = [" ".join([str(n)] * (n % 7 + 1)) for n in range(30 * file, 30 * file + 30)]
        texts(*documents).to_json(tmp_path / f"{file}.jsonl")
    return DataArguments(
        data_files=[str(tmp_path / "*.jsonl")],
        streaming=True,
        shuffle_buffer=20,
        validation_sequences=5,
        sequence_length=16,
    )


def test_a_stream_never_ends_and_is_the_same_each_time(stream, tokenizer):
    first, again = (list(load_rows(stream, tokenizer, seed=3)[0].take(100)) for _ in range(2))
    assert first == again
    other = list(load_rows(stream, tokenizer, seed=4)[0].take(100))
    assert first != other
    tokens = torch.tensor([row["input_ids"] for row in first]).flatten()
    ends = (tokens == END).nonzero().flatten().tolist()
    documents = [int(tokens[at - 1]) for at in ends]
    per_round = len(set(documents))
    assert len(documents) > 3 * per_round  # several rounds over the data, ...
    rounds = [documents[at : at + per_round] for at in range(0, 3 * per_round, per_round)]
    assert all(set(round_) == set(documents) for round_ in rounds)  # each of them whole, ...
    assert rounds[0] != rounds[1] != rounds[2]  # and in an order of its own


def test_what_a_stream_holds_out_is_not_trained_on(stream, tokenizer):
    train, held_out = load_rows(stream, tokenizer)
    assert len(held_out) == 5
    seen = {token for row in train.take(200) for token in row["input_ids"]} - {END}
    kept = {token for row in held_out for token in row["input_ids"]} - {END}
    assert kept
    assert not kept & seen
    assert len(kept | seen) == 90


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_both_stages(stream, tokenizer, streaming):
    stream.streaming, stream.prompt_length = streaming, 12
    for stage, length, columns in ((1, 16, {"input_ids", "position_ids"}), (2, 12, {"input_ids"})):
        for rows in load_rows(stream, tokenizer, stage):
            row = next(iter(rows))
            assert len(row["input_ids"]) == length
            assert row.keys() == columns


def test_a_stream_too_short_to_hold_out(stream, tokenizer):
    stream.validation_sequences = 1000
    with pytest.raises(ValueError, match="too few to hold 1000 of them out.*validation_sequences"):
        load_rows(stream, tokenizer)


def test_rows_do_not_depend_on_how_they_are_loaded(stream, tokenizer):
    """A stream that is not shuffled has the rows of the same files, loaded."""
    streamed = list(pack(load_texts(stream), tokenizer, 16).take(20))
    stream.streaming = False
    assert streamed == list(pack(load_texts(stream), tokenizer, 16).select(range(20)))


def test_a_file_that_was_changed_is_read_again(tmp_path, tokenizer):
    """`datasets` keeps what was made of it before."""
    data = DataArguments(data_files=[str(tmp_path / "a.txt")], sequence_length=3, validation_fraction=0)
    for text in ("1 2 3", "4 5 6"):
        (tmp_path / "a.txt").write_text(text)
        assert load_rows(data, tokenizer)[0]["input_ids"][:] == [[*map(int, text.split())]]


def test_documents_do_not_attend_to_each_other(family):
    if family == "gpt_oss":
        pytest.skip("reads no position_ids: refused, see below")
    model = tiny_model(family)
    one, other = torch.arange(1, 8)[None], torch.arange(20, 29)[None]
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    together = read(model, torch.cat([one, other], dim=1), positions).hidden_states
    torch.testing.assert_close(together[:, :7], read(model, one).hidden_states, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[:, 7:], read(model, other).hidden_states, atol=1e-4, rtol=1e-4)
    check_separation(model, torch.device("cpu"))


def test_a_family_that_can_not_keep_documents_apart_is_refused():
    with pytest.raises(ValueError, match="separate_documents: false"):
        check_separation(tiny_model("gpt_oss"), torch.device("cpu"))


def test_the_tokenizer_of_llama_2(shared):
    """A real one: BOS first, EOS last, no text lost."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared / "data/tokenizers/llama-hf")
    corpus = (Path(shared) / "data/corpora/wikitext2_valid.txt").read_text()[:20_000]
    documents = corpus.split("\n \n")
    rows = pack(texts(*documents), tokenizer, 128)
    expected = [
        token for text in documents if text for token in tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    ]
    assert list(itertools.chain(*rows["input_ids"])) == expected[: len(expected) // 128 * 128]
