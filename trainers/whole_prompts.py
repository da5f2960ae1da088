"""Prompts to be continued as they are, each as long as it is, beside texts that prompts are cut from."""

import datasets
from transformers import PreTrainedTokenizerBase

from ..measuring.prompts import Prompt, encode, pad_left, read_prompts
from .documents import warn
from .training_args import DataArguments


def load_whole_prompts(data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    """Prompts of `data.prompts`, in the tokenizer's chat template where it has one.

    Those that are measured on (`data.held_out_prompts`) and those of more than `prompt_length` tokens are left out, of
    which a warning tells.

    Returns:
        Columns `input_ids` and `attention_mask`, rows of `prompt_length`, padded on the left.

    Raises:
        ValueError: if a file can't be read, or no prompt is left.
    """
    prompts = read_prompts(data.prompts)
    measured_on = [prompt for file in data.held_out_prompts or () for prompt in read_prompts(file)]
    held_out = {_plain(turn) for prompt in measured_on for turn in prompt.turns}
    kept = [prompt for prompt in prompts if _plain(prompt.turns[0]) not in held_out]
    rows = encode([_first_turn(prompt) for prompt in kept], [[] for _ in kept], tokenizer, _has_chat(tokenizer))
    rows = [row for row in rows if row]
    fitting = [row for row in rows if len(row) <= data.prompt_length]
    if len(kept) < len(prompts):
        warn(f"{len(prompts) - len(kept)} of {len(prompts)} prompts are measured on, and left out of the training.")
    if len(fitting) < len(rows):
        warn(
            f"{len(rows) - len(fitting)} of {len(rows)} prompts have more than `prompt_length={data.prompt_length}` "
            "tokens, and are left out."
        )
    if not fitting:
        raise ValueError(
            f"Of the {len(prompts)} prompts of {data.prompts} none is left to train on. Raise `prompt_length`, or "
            "give others than are measured on."
        )
    # The widest row is the first, so that all become as wide.
    ids, mask = pad_left([[0] * data.prompt_length, *fitting])
    return datasets.Dataset.from_dict({"input_ids": ids[1:].int().numpy(), "attention_mask": mask[1:].int().numpy()})


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _first_turn(prompt: Prompt) -> Prompt:
    return Prompt(prompt.where, prompt.turns[:1], token_ids=prompt.token_ids)


def _has_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None
