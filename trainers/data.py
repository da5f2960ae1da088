"""Texts to sequences of tokens, through `datasets`."""

from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerBase


_LOADERS = {".txt": "text", ".py": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_texts(
    dataset: str | None = None,
    data_files: list[str] | None = None,
    config: str | None = None,
    split: str = "train",
) -> datasets.Dataset:
    """Loads a dataset of the Hub or of a folder, or files. A text file is one document.

    Raises:
        ValueError: unless exactly one source is named, and for files that are missing or of unknown kind.
    """
    if (dataset is None) == (data_files is None):
        raise ValueError(f"Name a `dataset` or `data_files`, one of both; got {dataset!r} and {data_files!r}.")
    if dataset is not None:
        return datasets.load_dataset(dataset, config, split=split)
    missing = [name for name in data_files if not Path(name).is_file()]
    if missing:
        raise ValueError(f"`data_files` that don't exist: {missing}.")
    kinds = {_LOADERS.get(Path(name).suffix) for name in data_files}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(f"`data_files` must be of one kind, of {sorted(_LOADERS)}; got {data_files}.")
    (kind,) = kinds
    options = {"sample_by": "document"} if kind == "text" else {}
    return datasets.load_dataset(kind, data_files=data_files, split="train", **options)


def pack(
    texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, sequence_length: int, text_column: str = "text"
) -> datasets.Dataset:
    """Tokenizes the texts, joins them with the end-of-sequence token, and cuts rows of `sequence_length` tokens.

    A row may hold the end of one text and the beginning of the next, and attention crosses that border. What is left
    over after every 1,000 texts is dropped.

    Returns:
        A dataset with the one column `input_ids`.

    Raises:
        ValueError: if the texts are too short for one row, or have no such column.
    """
    if text_column not in texts.column_names:
        raise ValueError(f"The data has no column {text_column!r}, only {texts.column_names}: set `text_column`.")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def cut(batch: dict[str, list]) -> dict[str, list]:
        tokens = []
        for ids in tokenizer(batch[text_column], return_attention_mask=False, verbose=False)["input_ids"]:
            tokens += ids + end
        ends = range(sequence_length, len(tokens) + 1, sequence_length)
        return {"input_ids": [tokens[at - sequence_length : at] for at in ends]}

    rows = texts.map(cut, batched=True, batch_size=1000, remove_columns=texts.column_names, desc="Tokenizing")
    if len(rows) == 0:
        raise ValueError(
            f"The {len(texts)} texts hold fewer tokens than one sequence of {sequence_length}. "
            "Give more text, or lower `sequence_length` (stage 2: `prompt_length`)."
        )
    return rows


def split(rows: datasets.Dataset, validation_fraction: float) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Training rows, and the last share of the rows, held out (None where the fraction is 0).

    Raises:
        ValueError: if nothing is left to train on.
    """
    held_out = round(len(rows) * validation_fraction)
    if validation_fraction > 0:
        held_out = max(1, held_out)
    if not 0 <= held_out < len(rows):
        raise ValueError(
            f"`validation_fraction={validation_fraction}` leaves nothing to train on of {len(rows)} sequences."
        )
    train = rows.select(range(len(rows) - held_out))
    return train, rows.select(range(len(rows) - held_out, len(rows))) if held_out else None
