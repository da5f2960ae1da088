"""Continuations kept on disk: written once, trained on many times."""

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from tqdm import tqdm

from .continuations import ContinuationSampler
from .launch import in_main_process
from .run_lock import hold


ROWS_PER_FILE = 1024  # an interrupted run has to write again no more than these
DESCRIPTION = "description.json"


def write_continuations(
    prompts: datasets.Dataset,
    sampler: ContinuationSampler,
    accelerator: Accelerator,
    folder: str | Path,
    n_rows: int,
    batch_size: int,
    seed: int,
    described: dict,
) -> datasets.Dataset:
    """Continues prompts in all processes together; what lies in the folder already is kept.

    The prompts come in a random order, and again in another, with other continuations, where there are too few.

    Args:
        prompts: a column `input_ids` of rows of equal length; with an `attention_mask`, of prompts after padding.
        batch_size: prompts that a process continues at once.
        described: what the continuations depend on (base model, lengths, sampling), in JSON's types.

    Returns:
        Those of the prompts and `continuation`, `n_rows` rows.

    Raises:
        ValueError: if the folder holds continuations that were made otherwise, or another launch writes there.
    """
    folder = Path(folder)
    is_whole = in_main_process(lambda: _finished(folder)[1] >= n_rows)
    with nullcontext() if is_whole else hold(folder):
        described = json.loads(json.dumps(described | {"seed": seed, "prompts": _digest(prompts)}))
        if accelerator.is_main_process and not (folder / DESCRIPTION).exists():
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = (folder / DESCRIPTION).with_suffix(".unfinished")
            unfinished.write_text(json.dumps(described, indent=2) + "\n")
            unfinished.rename(folder / DESCRIPTION)
        accelerator.wait_for_everyone()
        _check_description(folder, described)
        files, done = _finished(folder)

        @cache
        def order(round_: int) -> list[int]:
            return torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed + round_)).tolist()

        shown = {"desc": "continuations", "unit": "prompt", "disable": not accelerator.is_main_process}
        with tqdm(total=n_rows, initial=done, **shown) as progress:
            while done < n_rows:
                end = min(done + ROWS_PER_FILE, n_rows)
                texts = _continue(range(done, end), prompts, order, sampler, accelerator, batch_size, seed)
                files.append(folder / f"{done:09}-{end:09}.parquet")
                if accelerator.is_main_process:
                    _write(files[-1], texts)
                progress.update(end - done)
                done = end
        accelerator.wait_for_everyone()
        return datasets.Dataset.from_parquet([str(file) for file in files]).select(range(n_rows))


def _continue(
    numbers: range,
    prompts: datasets.Dataset,
    order: Callable[[int], list[int]],
    sampler: ContinuationSampler,
    accelerator: Accelerator,
    batch_size: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Columns of some rows, prompts and what comes after them, the same in every process.

    Args:
        order: of the prompts in each round.
    """
    processes = accelerator.num_processes
    share = -(-len(numbers) // processes)  # as many in every process: a sharded base model needs all of them
    first = accelerator.process_index * share
    mine = [numbers[at % len(numbers)] for at in range(first, first + share)]
    written = []
    for at in range(0, share, batch_size):
        some = mine[at : at + batch_size]
        rounds = torch.tensor([number // len(prompts) for number in some], device=accelerator.device)
        rows = [prompts[order(number // len(prompts))[number % len(prompts)]] for number in some]
        names = [name for name in ("input_ids", "attention_mask") if name in rows[0]]
        columns = {name: torch.tensor([row[name] for row in rows], device=accelerator.device) for name in names}
        input_ids, mask = columns["input_ids"], columns.get("attention_mask")
        texts = sampler.write(input_ids, seed + 2**32 * (rounds + 1), mask)
        written.append(columns | {"continuation": texts[:, input_ids.shape[1] :]})
    return {
        name: accelerator.gather(torch.cat([columns[name] for columns in written]))[: len(numbers)]
        for name in written[0]
    }


def _digest(prompts: datasets.Dataset) -> str:
    """Of the number of prompts and of some of them, to tell others apart."""
    some = prompts.select(range(0, len(prompts), -(-len(prompts) // 1000)))["input_ids"][:]
    return hashlib.sha256(json.dumps([len(prompts), some]).encode()).hexdigest()[:16]


def _finished(folder: Path) -> tuple[list[Path], int]:
    """The files that follow each other from the first row on, and the rows in them."""
    files, done = [], 0
    for file in sorted(folder.glob("*-*.parquet")):
        first, end = map(int, file.stem.split("-"))
        if first == done:
            files.append(file)
            done = end
    return files, done


def _write(file: Path, columns: dict[str, torch.Tensor]) -> None:
    """All of it or nothing: the name appears when the file is whole."""
    rows = datasets.Dataset.from_dict({name: ids.int().cpu().numpy() for name, ids in columns.items()})
    unfinished = file.with_suffix(".unfinished")
    rows.to_parquet(str(unfinished))
    unfinished.rename(file)


def _check_description(folder: Path, described: dict) -> None:
    found = json.loads((folder / DESCRIPTION).read_text())
    differ = sorted(key for key in found | described if found.get(key) != described.get(key))
    if differ:
        raise ValueError(
            f"The continuations in {folder} were written with "
            f"{', '.join(f'{key}={found.get(key)!r}' for key in differ)}, not "
            f"{', '.join(f'{key}={described.get(key)!r}' for key in differ)}. Set `generated_dataset` to another "
            "folder, or delete that one."
        )
