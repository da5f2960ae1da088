"""Texts to sequences of tokens, through `datasets`: loaded or streamed, packed without waste, some held out."""

import glob
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from .training_args import DataArguments


_LOADERS = {".txt": "text", ".py": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

Texts = datasets.Dataset | datasets.IterableDataset


def load_rows(data: DataArguments, tokenizer: PreTrainedTokenizerBase, stage: int = 1, seed: int = 0):
    """What to train on, and what is held out (None where nothing is): sequences, or prompts in stage 2.

    A stream never ends: it begins anew, in another order. Its validation rows come from its first texts, which it then
    leaves out.

    Returns:
        A `datasets.Dataset`, or `IterableDataset` of a stream, and a `datasets.Dataset` or None. Columns: `input_ids`,
        and `position_ids` where documents are kept apart.

    Raises:
        ValueError: where the data can't be found or read, or are too few.
    """
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


def load_texts(data: DataArguments) -> Texts:
    """Loads a dataset of the Hub or of a folder, or files. A text file is one document.

    Raises:
        ValueError: unless exactly one source is named, and for files that are missing or of unknown kind.
    """
    if (data.dataset is None) == (data.data_files is None):
        raise ValueError(
            f"Name a `dataset` or `data_files`, one of both; got {data.dataset!r} and {data.data_files!r}."
        )
    if data.dataset is not None:
        saved = Path(data.dataset)
        if (saved / "state.json").is_file() or (saved / "dataset_dict.json").is_file():  # of `save_to_disk`
            texts = datasets.load_from_disk(data.dataset)
            texts = texts[data.dataset_split] if isinstance(texts, datasets.DatasetDict) else texts
            return texts.to_iterable_dataset() if data.streaming else texts
        return datasets.load_dataset(
            data.dataset,
            data.dataset_config,
            split=data.dataset_split,
            revision=data.dataset_revision,
            streaming=data.streaming,
        )
    files = [path for name in data.data_files for path in sorted(glob.glob(name, recursive=True)) or [name]]
    missing = [name for name in files if not Path(name).is_file()]
    if missing:
        raise ValueError(f"`data_files` that don't exist: {missing}.")
    kinds = {_LOADERS.get(Path(name.removesuffix(".gz")).suffix) for name in files}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(f"`data_files` must be of one kind, of {sorted(_LOADERS)}; got {files}.")
    (kind,) = kinds
    options = {"sample_by": "document"} if kind == "text" else {}
    return datasets.load_dataset(kind, data_files=files, split="train", streaming=data.streaming, **options)


def pack(
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    text_column: str = "text",
    separate_documents: bool = True,
) -> Texts:
    """Tokenizes texts, joins them with the end-of-sequence token, and cuts rows of `length` tokens.

    A row may hold the end of one text and the beginning of the next. Nothing is left out but what is too short for a
    row at the very end; of a stream not even that, for it begins anew.

    Args:
        text_column: of texts, or of conversations, lists of messages {"role", "content"} or {"from", "value"}, which
            the tokenizer's chat template makes texts of.
        separate_documents: adds `position_ids` that start again with each document, by which transformers keeps
            documents from attending to each other.

    Raises:
        ValueError: if the texts are too short for one row, or have no such column.
    """
    columns = texts.column_names
    if columns is not None and text_column not in columns:
        raise ValueError(f"The data has no column {text_column!r}, only {columns}: set `text_column`.")
    features = {"input_ids": datasets.List(datasets.Value("int32"))}
    if separate_documents:
        features["position_ids"] = datasets.List(datasets.Value("int32"))
    features = datasets.Features(features)
    is_stream = isinstance(texts, datasets.IterableDataset)

    def rows(code: str) -> Iterator[dict]:
        documents = _tokenized(_forever(texts) if is_stream else texts, tokenizer, text_column)
        is_empty = True
        for row in _cut(documents, length, separate_documents):
            is_empty = False
            yield row
        if is_empty:
            raise ValueError(
                f"The {len(texts)} texts hold fewer tokens than one sequence of {length}. Give more text, or lower "
                "`sequence_length` (stage 2: `prompt_length`)."
            )

    # `datasets` keeps what is made once, by the arguments; another version of this file makes something else.
    options = {"features": features, "gen_kwargs": {"code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}}
    if is_stream:
        return datasets.IterableDataset.from_generator(rows, **options)
    try:
        return datasets.Dataset.from_generator(rows, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None  # what `rows` raised


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

    documents = _tokenized(counted(), tokenizer, text_column, batch_size=1)
    rows = list(itertools.islice(_cut(documents, length, separate_documents), n_rows))
    if len(rows) < n_rows:
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


def _forever(texts: datasets.IterableDataset) -> Iterator[dict]:
    """A stream again and again, in another order each time where it is shuffled."""
    for epoch in itertools.count():
        texts.set_epoch(epoch)
        is_empty = True
        for text in texts:
            is_empty = False
            yield text
        if is_empty:
            raise ValueError("The stream has no texts left to train on. Give more, or lower `validation_sequences`.")


def _tokenized(
    texts: Iterator[dict], tokenizer: PreTrainedTokenizerBase, column: str, batch_size: int = 1000
) -> Iterator[np.ndarray]:
    """The tokens of each text that is not empty, the end-of-sequence token last."""
    end = tokenizer.eos_token_id
    texts = (row[column] for row in texts)
    while batch := list(itertools.islice(texts, batch_size)):
        batch = [text for text in batch if text]
        chats = bool(batch) and not isinstance(batch[0], str)
        if chats:
            batch = [_as_text(messages, tokenizer, column) for messages in batch]
        for ids in tokenizer(batch, add_special_tokens=not chats, verbose=False)["input_ids"] if batch else []:
            yield np.array(ids if end is None or ids[-1:] == [end] else [*ids, end], dtype=np.int32)


def _as_text(messages: list[dict], tokenizer: PreTrainedTokenizerBase, column: str) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The column {column!r} holds conversations, but the base model's tokenizer has no chat template to write "
            "them with. Set `text_column` to one of texts, or train for the model's chat version."
        )
    if "from" in messages[0]:  # ShareGPT's keys
        unknown = {part["from"] for part in messages} - _ROLES.keys()
        if unknown:
            raise ValueError(f"The conversations in {column!r} are from {sorted(unknown)}, not only {sorted(_ROLES)}.")
        messages = [{"role": _ROLES[part["from"]], "content": part["value"]} for part in messages]
    return tokenizer.apply_chat_template(messages, tokenize=False)


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
