"""Rows to documents: texts and conversations to tokens. What can't be read is left out, counted and told."""

import itertools
import json
import logging
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..measuring.text_files import is_whole


WHERE = "__where__"  # key of a row's file and its number there
# Rows, and the share of bad ones among those so far, from which on most are sure to be bad: where half are, chance is
# six standard deviations away.
SURE_AFTER, SURE_SHARE = 1000, 0.6
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_KINDS = {bool: "a truth value", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}

logger = logging.getLogger(__name__)


class LeftOut:
    """Counts rows that can't be trained on, so that they are told of and don't end a run, unless they are most.

    Args:
        is_stream: tells of them as they come: of the first, and whenever they have become ten times as many.
    """

    def __init__(self, is_stream: bool = False):
        self.is_stream, self.kept, self.count, self.first = is_stream, 0, 0, ""
        self._tell_at = 1

    def keep(self) -> None:
        self.kept += 1
        self._tell()

    def add(self, reason: str) -> None:
        """Raises a ValueError as soon as it is sure that most rows are bad."""
        self.count += 1
        self.first = self.first or reason.encode(errors="backslashreplace").decode()  # it may quote half characters
        if self.kept + self.count >= SURE_AFTER:
            self.check(SURE_SHARE)
        self._tell()

    def check(self, share: float = 0.5) -> None:
        """Raises a ValueError where more than this share is left out."""
        if self.count > share * (self.kept + self.count):
            raise ValueError(f"{self._share()} can't be trained on. The first: {self.first}.")

    def _tell(self) -> None:
        if self.is_stream and self._tell_at <= self.count <= self.kept:  # where they are most, an error will tell
            warn(str(self))
            self._tell_at = 10 * self.count

    def _share(self) -> str:
        return f"{self.count} of {self.kept + self.count} rows" + " so far" * self.is_stream

    def __str__(self) -> str:
        return f"{self._share()} can't be trained on, and are left out. The first: {self.first}."


def warn(message: str) -> None:
    """Says it once a launch, not once a process."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0:
        logger.warning(message)


def tokenized(
    rows: Iterable[dict], tokenizer: PreTrainedTokenizerBase, column: str, left_out: LeftOut, batch_size: int = 1000
) -> Iterator[np.ndarray]:
    """The tokens of each document, the end-of-sequence token last.

    Args:
        column: of texts, or of conversations, lists of messages {"role", "content"} or {"from", "value"}, which the
            tokenizer's chat template makes texts of. Empty texts are passed over.
        left_out: counts what is neither.
    """
    end = tokenizer.eos_token_id
    documents = _documents(rows, tokenizer, column, left_out)
    while batch := list(itertools.islice(documents, batch_size)):
        for is_chat, some in itertools.groupby(batch, key=lambda document: document[1]):
            some = [text for text, _ in some]
            # A chat template writes the special tokens itself.
            for ids in tokenizer(some, add_special_tokens=not is_chat, verbose=False)["input_ids"]:
                yield np.array(ids if end is None or ids[-1:] == [end] else [*ids, end], dtype=np.int32)


def _documents(
    rows: Iterable[dict], tokenizer: PreTrainedTokenizerBase, column: str, left_out: LeftOut
) -> Iterator[tuple[str, bool]]:
    """Texts, and whether each was a conversation."""
    for read, row in enumerate(rows, start=1):
        value = row.get(column)
        if column in row and (value is None or value == ""):
            continue
        is_chat = isinstance(value, list)
        if is_chat and tokenizer.chat_template is None:
            raise ValueError(
                f"The column {column!r} holds conversations, but the base model's tokenizer has no chat template to "
                "write them with. Set `text_column` to one of texts, or train for the model's chat version."
            )
        try:
            text = _text(row, column, tokenizer)
        except _Unreadable as problem:
            beginning = json.dumps(value, ensure_ascii=False, default=str)[:80]
            source, number = row.get(WHERE, (beginning, read))
            left_out.add(f"row {number}'s `{column}` {problem} ({source})")
            continue
        left_out.keep()
        yield text, is_chat


class _Unreadable(ValueError):
    """What is wrong with a row, as the rest of a sentence about it."""


def _text(row: dict, column: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if column not in row:
        raise _Unreadable(f"is missing: it has only {sorted(row.keys() - {WHERE})}, so set `text_column`")
    text = row[column]
    if isinstance(text, list):
        text = _written([_message(part) for part in text], tokenizer)
    if not isinstance(text, str):
        raise _Unreadable(f"is {_kind(text)}, neither a text nor a list of messages")
    if not is_whole(text):
        raise _Unreadable("has half of a character")
    return text


def _message(part) -> dict:
    """A message as chat templates know it."""
    if not isinstance(part, dict):
        raise _Unreadable(f"is a list of which a part is {_kind(part)}, not a message")
    if part.get("from") is not None:  # ShareGPT's keys
        role = _ROLES.get(str(part["from"]))
        if role is None:
            raise _Unreadable(f"has a message from {part['from']!r}, not from one of {sorted(_ROLES)}")
        part = {"role": role, "content": part.get("value")}
    if not isinstance(part.get("role"), str):
        raise _Unreadable("has a message without `role`")
    content = part.get("content")
    if content is None and not part.get("tool_calls"):  # a call of a tool needs no words
        raise _Unreadable("has a message without `content`")
    if not isinstance(content, str | list | None):
        raise _Unreadable(f"has a message whose `content` is {_kind(content)}")
    return part


def _written(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> str:
    if not messages:
        raise _Unreadable("is a conversation without messages")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program of somebody else: it raises what it likes
        raise _Unreadable(f"is refused by the chat template: {' '.join(str(error).split())}") from error
    if not text.strip():
        raise _Unreadable("is a conversation of which the chat template writes nothing")
    return text


def _kind(value) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")
