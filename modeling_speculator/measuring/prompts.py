"""Prompts to measure on, in the formats that they are published in."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .named_datasets import files_of_folder, load_split
from .text_files import is_whole, lines_of, rows_of, suffix_of


_SUFFIXES = (".txt", ".jsonl", ".json")
_MT_BENCH = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
_FORMATS = (
    "`prompt` or `text` (and `category`), Spec-Bench's and MT-bench's `turns` (and `category`), HumanEval's `task_id` "
    "and `prompt`, or GSM8K's `question` and `answer`"
)


@dataclass(frozen=True)
class Prompt:
    """
    where: file and line, for messages.
    turns: what the user says, one after another; the model answers each.
    category: task that it belongs to, "" if unknown.
    reference: what a right answer ends with, where one is known.
    token_ids: of the first turn, where it was cut from a longer text; else the tokenizer's.
    """

    where: str
    turns: tuple[str, ...]
    category: str = ""
    reference: str | None = None
    token_ids: tuple[int, ...] | None = None


def read_prompts(source: str, limit: int | None = None) -> list[Prompt]:
    """Reads prompts from a file or a dataset.

    Args:
        source: a file, .txt (a prompt a line), .jsonl (an object a line) or .json (or one array of them), gzipped or
            not, or a dataset's Hub id or folder, with its configuration and split where there are several:
            `openai/openai_humaneval`, `openai/gsm8k:main`, `my-org/prompts::train`. The split is "test" unless it is
            named.
        limit: at most, spread evenly, so that every category keeps its share.

    Raises:
        ValueError: for a source that is missing, broken, empty or of unknown form, with the line that is wrong.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, but is {limit}.")
    prompts = [_parse(row, where) for row, where in _rows(source)]
    if not prompts:
        raise ValueError(f"{source} holds no prompts: give a file with one a line, or jsonl with {_FORMATS}.")
    if limit is not None and limit < len(prompts):
        prompts = [prompts[at * len(prompts) // limit] for at in range(limit)]
    return prompts


def _rows(source: str) -> Iterator[tuple[dict, str]]:
    """Rows of a file or a dataset, and where each comes from."""
    if Path(source).is_file():
        yield from _rows_of_file(source)
        return
    if suffix_of(source) in _SUFFIXES and not Path(source).is_dir():
        raise ValueError(f"{source}: there is no such file.")
    name, config, split = (source.split(":") + ["", ""])[:3]
    dataset = name, config or None, split or "test"
    if files := files_of_folder(*dataset, _SUFFIXES):
        for path in files:
            yield from _rows_of_file(path)
        return
    for number, row in enumerate(load_split(*dataset), start=1):
        yield row, f"{source}, row {number}"


def _rows_of_file(path: str) -> Iterator[tuple[dict, str]]:
    kind = suffix_of(path)
    if kind not in _SUFFIXES:
        raise ValueError(f"{path}: prompts are read from {', '.join(_SUFFIXES)}, gzipped or not, not from {kind!r}.")
    if kind != ".txt":
        for number, row in rows_of(path):
            yield row, f"{path}, {'row' if kind == '.json' else 'line'} {number}"
        return
    for number, line in lines_of(path):
        if line.strip():
            yield {"prompt": line.rstrip("\n")}, f"{path}, line {number}"


def _parse(row: dict, where: str) -> Prompt:
    category, reference = row.get("category") or "", None
    if "turns" in row:
        turns = row["turns"]
        category = "mt_bench" if category in _MT_BENCH else category
    elif "prompt" in row or "text" in row:
        turns = [row["prompt"] if "prompt" in row else row["text"]]
        category = category or ("humaneval" if str(row.get("task_id")).startswith("HumanEval") else "")
    elif "question" in row and "answer" in row:
        turns, category = [row["question"]], category or "gsm8k"
        reference = row["answer"] if isinstance(row["answer"], str) else None
    else:
        raise ValueError(f"{where}: of unknown form, with {sorted(row)}. Known are {_FORMATS}.")
    if not isinstance(turns, list) or not turns or not all(map(_is_said, turns)):
        raise ValueError(f"{where}: prompts have to be texts that are not empty, but it says {turns!r}.")
    return Prompt(where, tuple(turns), category, reference)


def _is_said(turn) -> bool:
    return isinstance(turn, str) and bool(turn.strip()) and is_whole(turn)


def encode(
    prompts: list[Prompt], answers: list[list[str]], tokenizer: PreTrainedTokenizerBase, chat: bool = False
) -> list[list[int]]:
    """Token ids of prompts, each up to its first turn that has no answer yet.

    Args:
        answers: of each prompt, to its turns so far.
        chat: whether to put them into the tokenizer's chat template; otherwise they are joined line by line.
    """
    rows = []
    for prompt, given in zip(prompts, answers, strict=True):
        said = [text for pair in zip(prompt.turns, given, strict=False) for text in pair]
        said.append(prompt.turns[len(given)])
        if prompt.token_ids is not None:
            rows.append(list(prompt.token_ids))
        elif chat:
            messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
            rows.append(
                tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors=None
                )["input_ids"]
            )
        else:
            rows.append(tokenizer("\n".join(said))["input_ids"])
    return rows


def too_long(prompt: Prompt, row: list[int], model: PreTrainedModel, max_new_tokens: int) -> str | None:
    """What is wrong with the length of a prompt of some tokens; None where nothing is."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not row:
        return f"{prompt.where}: a prompt of no tokens."
    if limit is not None and len(row) + max_new_tokens > limit:
        return (
            f"{prompt.where}: a prompt of {len(row)} tokens and {max_new_tokens} new ones are more than the {limit} "
            "positions of the base model. Lower `max_new_tokens`, or leave out what is too long (`--leave_out_long`)."
        )
    return None


def fitting_prompts(
    prompts: list[Prompt], tokenizer, model: PreTrainedModel, max_new_tokens: int, chat: bool, leave_out: bool
) -> list[Prompt]:
    """The prompts whose first turn leaves room for its answer.

    Raises:
        ValueError: for the first that does not, unless such are to be left out, and some are left.
    """
    rows = encode(prompts, [[] for _ in prompts], tokenizer, chat)
    problems = [too_long(prompt, row, model, max_new_tokens) for prompt, row in zip(prompts, rows, strict=True)]
    fitting = [prompt for prompt, problem in zip(prompts, problems, strict=True) if problem is None]
    if len(fitting) < len(prompts) and not leave_out:
        raise ValueError(next(problem for problem in problems if problem is not None))
    if prompts and not fitting:
        raise ValueError(
            f"None of the {len(prompts)} prompts leaves room for {max_new_tokens} new tokens in the base model's "
            "context. Give shorter ones, or lower `max_new_tokens`."
        )
    return fitting


def check_context(model: PreTrainedModel, n_tokens: int) -> None:
    """Raises a ValueError where texts of so many tokens are longer than a model's context."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and n_tokens > limit:
        raise ValueError(
            f"Prompts and new tokens, {n_tokens} in all, are more than the {limit} positions of the base model. Lower "
            "`prompt_length` or `max_new_tokens`."
        )


def digest_of(prompts: list[Prompt]) -> str:
    """To tell prompts from others."""
    said = [[prompt.turns, prompt.token_ids] for prompt in prompts]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def pad_left(rows: Sequence[list[int]], pad_token_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids as a batch and its mask, (batch, longest) each."""
    longest = max(map(len, rows))
    padded = torch.tensor([[pad_token_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return padded, mask


def cut_prompts(
    texts: list[list[int]], length: int, n: int, longest: int | None = None, bos_token_id: int | None = None
) -> torch.Tensor:
    """n prompts of `length` tokens, (n, length), from the middle of texts; spread evenly over those long enough.

    Args:
        longest: of the lengths that are compared: prompts of all of them come from the same texts, and end at the same
            token, so that the same is to be continued.
        bos_token_id: kept at the beginning of a prompt whose text begins with it.

    Raises:
        ValueError: if too few texts are so long.
    """
    longest = max(length, longest or length)
    rows = []
    for text in texts:
        if len(text) >= longest:
            end = (len(text) + longest) // 2
            row = text[end - length : end]
            rows.append([bos_token_id, *row[1:]] if bos_token_id is not None and text[0] == bos_token_id else row)
    if len(rows) < n:
        raise ValueError(f"Only {len(rows)} of {len(texts)} prompts have {longest} tokens, where {n} are needed.")
    return torch.tensor([rows[at * len(rows) // n] for at in range(n)])


def prompts_of_lengths(
    prompts: list[Prompt], lengths: list[int], tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[Prompt]:
    """Prompts of each of some lengths, in tokens, cut from those that are long enough; their category is their length.

    Those of all lengths end at the same tokens, so that the same is to be continued.

    Args:
        limit: of each length at most, spread evenly.

    Raises:
        ValueError: if no prompt is as long as the longest.
    """
    texts = [tokenizer(prompt.turns[0], verbose=False)["input_ids"] for prompt in prompts]
    long = sum(len(text) >= max(lengths) for text in texts)
    if not long:
        raise ValueError(f"No prompt has {max(lengths)} tokens: the longest has {max(map(len, texts))}.")
    cut = []
    for length in lengths:
        rows = cut_prompts(texts, length, min(limit or long, long), max(lengths), tokenizer.bos_token_id).tolist()
        for row in rows:
            where = f"a prompt cut to {length} tokens"
            cut.append(Prompt(where, (tokenizer.decode(row),), f"{length} tokens", token_ids=tuple(row)))
    return cut
