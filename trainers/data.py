"""Documents to sequences of tokens: packed without waste, some held out."""

import hashlib
import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from ..measuring.text_files import rows_of
from .documents import LeftOut, tokenized, warn
from .texts import FileRows, Texts, check_column, load_texts, read_rows
from .training_args import DataArguments
from .whole_prompts import load_whole_prompts


def load_rows(data: DataArguments, tokenizer: PreTrainedTokenizerBase, stage: int = 1, seed: int = 0):
    """What to train on, and what is held out (None where nothing is): sequences, or prompts in stage 2.

    A stream never ends: it begins anew, in another order. Its validation rows come from its first texts, which it then
    leaves out.

    Returns:
        A `datasets.Dataset`, or `IterableDataset` of a stream, and a `datasets.Dataset` or None. Columns: `input_ids`,
        and `position_ids` where documents are kept apart, or `attention_mask` where prompts are whole.

    Raises:
        ValueError: where the data can't be found or read, or are too few.
    """
    if data.prompts is not None and stage == 2:
        return split(load_whole_prompts(data, tokenizer), data.validation_fraction, data.validation_sequences)
    texts = load_texts(data)
    # A prompt is whatever comes before a continuation: the end of another document, too.
    cut = (data.sequence_length, data.separate_documents) if stage == 1 else (data.prompt_length, False)
    length, separate_documents = cut
    options = tokenizer, length, data.text_column, separate_documents
    if not data.streaming:
        return split(pack(texts, *options), data.validation_fraction, data.validation_sequences)
    if not data.validation_fraction:
        return pack(texts.shuffle(seed=seed, buffer_size=data.shuffle_buffer), *options), None
    held_out, n_texts = first_rows(texts, data.validation_sequences, *options)
    rest = texts.skip(n_texts).shuffle(seed=seed, buffer_size=data.shuffle_buffer)
    return pack(rest, *options), held_out


def pack(
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    text_column: str = "text",
    separate_documents: bool = True,
) -> datasets.Dataset | datasets.IterableDataset:
    """Tokenizes texts, joins them with the end-of-sequence token, and cuts rows of `length` tokens.

    A row may hold the end of one text and the beginning of the next. Nothing is left out but what can't be read, of
    which a warning tells, and what is too short for a row at the very end; of a stream not even that: it begins anew.

    Args:
        text_column: of texts, or of conversations, lists of messages {"role", "content"} or {"from", "value"}, which
            the tokenizer's chat template makes texts of.
        separate_documents: adds `position_ids` that start again with each document, by which transformers keeps
            documents from attending to each other.

    Raises:
        ValueError: if the texts are too short for one row, have no such column, or most of them can't be read.
    """
    if not isinstance(texts, FileRows) and texts.column_names is not None:
        check_column(texts.column_names, text_column, "The data")
    packed = _packed_stream if isinstance(texts, datasets.IterableDataset) else _packed
    return packed(texts, tokenizer, length, text_column, separate_documents)


def first_rows(
    texts: datasets.IterableDataset,
    n_rows: int,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    text_column: str = "text",
    separate_documents: bool = True,
) -> tuple[datasets.Dataset, int]:
    """The first `n_rows` rows of a stream, and the number of texts that they came from."""
    n_texts = 0

    def counted() -> Iterator[dict]:
        nonlocal n_texts
        for text in texts:
            n_texts += 1
            yield text

    left_out = LeftOut(is_stream=True)
    documents = tokenized(counted(), tokenizer, text_column, left_out, batch_size=1)
    rows = list(itertools.islice(_cut(documents, length, separate_documents), n_rows))
    if len(rows) < n_rows:
        left_out.check()
        raise ValueError(
            f"The {n_texts} texts of the stream make only {len(rows)} sequences of {length} tokens, too few to hold "
            f"{n_rows} of them out. Lower `validation_sequences`, or set `streaming: false`."
        )
    return datasets.Dataset.from_list(rows), n_texts


def split(
    rows: datasets.Dataset, validation_fraction: float, validation_sequences: int | None = None
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Training rows, and the last share of the rows, held out (None where the fraction is 0).

    Args:
        validation_fraction: at least one row is held out where it is not 0 ...
        validation_sequences: ... and at most so many.

    Raises:
        ValueError: if nothing is left to train on.
    """
    held_out = round(len(rows) * validation_fraction)
    if validation_fraction > 0:
        held_out = max(1, min(held_out, validation_sequences or held_out))
    if not 0 <= held_out < len(rows):
        raise ValueError(
            f"`validation_fraction={validation_fraction}` leaves nothing to train on of {len(rows)} sequences."
        )
    train = rows.select(range(len(rows) - held_out))
    return train, rows.select(range(len(rows) - held_out, len(rows))) if held_out else None


def _packed(
    texts: FileRows | datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    text_column: str,
    separate_documents: bool,
) -> datasets.Dataset:
    features = _features(separate_documents)

    def rows(code: str) -> Iterator[dict]:
        left_out, is_empty = LeftOut(), True
        documents = tokenized(texts, tokenizer, text_column, left_out)
        for row in _cut(documents, length, separate_documents):
            is_empty = False
            yield row | {"left_out": None}
        left_out.check()
        if is_empty:
            raise ValueError(
                f"The {left_out.kept} texts hold fewer tokens than one sequence of {length}. Give more text, or lower "
                "`sequence_length` (stage 2: `prompt_length`)."
            )
        yield dict.fromkeys(features, []) | {"left_out": str(left_out) if left_out.count else None}

    # `datasets` keeps what is made once, by the arguments; other code makes something else.
    try:
        made = datasets.Dataset.from_generator(
            rows,
            features=datasets.Features(features | {"left_out": datasets.Value("string")}),
            gen_kwargs={"code": _code()},
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None  # what `rows` raised
    # The last row tells what was left out, so that a run that finds all this made hears of it, too.
    if made[-1]["left_out"] is not None:
        warn(made[-1]["left_out"])
    return made.select(range(len(made) - 1)).remove_columns("left_out")


def _packed_stream(
    texts: datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    text_column: str,
    separate_documents: bool,
) -> datasets.IterableDataset:
    def rows() -> Iterator[dict]:
        left_out = LeftOut(is_stream=True)
        documents = tokenized(_forever(texts, left_out), tokenizer, text_column, left_out)
        yield from _cut(documents, length, separate_documents)

    return datasets.IterableDataset.from_generator(rows, features=datasets.Features(_features(separate_documents)))


def _features(separate_documents: bool) -> dict[str, datasets.List]:
    names = ["input_ids", "position_ids"] if separate_documents else ["input_ids"]
    return {name: datasets.List(datasets.Value("int32")) for name in names}


def _code() -> str:
    """A digest of all that makes documents of files."""
    files = (inspect.getfile(function) for function in (_packed, tokenized, read_rows, rows_of))
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def _forever(texts: datasets.IterableDataset, left_out: LeftOut) -> Iterator[dict]:
    """A stream again and again, in another order each time where it is shuffled."""
    for epoch in itertools.count():
        texts.set_epoch(epoch)
        yield from texts
        left_out.check()
        if not left_out.kept:
            raise ValueError("The stream has no texts left to train on. Give more, or lower `validation_sequences`.")


def _cut(documents: Iterator[np.ndarray], length: int, separate_documents: bool) -> Iterator[dict]:
    """Rows of `length` tokens of documents that are joined."""
    parts, positions, filled = [], [], 0
    for document in documents:
        at = 0
        while at < len(document):
            part = document[at : at + length - filled]
            parts.append(part)
            positions.append(np.arange(len(part), dtype=np.int32))  # in this row: what was cut off is not attended to
            at, filled = at + len(part), filled + len(part)
            if filled == length:
                row = {"input_ids": np.concatenate(parts).tolist()}
                if separate_documents:
                    row["position_ids"] = np.concatenate(positions).tolist()
                yield row
                parts, positions, filled = [], [], 0
