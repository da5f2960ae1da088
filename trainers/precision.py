"""The `precision` of a recipe: what "fast" is here, what a run that goes on was begun in, what contradicts it."""

import os
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from ..model_cards.provenance_file import read_provenance
from ..precision import check_precision, resolve_precision
from .run_record import latest_checkpoint


BY_THE_LAUNCHER = "ACCELERATE_MIXED_PRECISION"  # what `accelerate launch` sets, and TrainingArguments reads
_MIXED = {"float32": "no", "bfloat16": "bf16"}


def settle_precision(args: TrainingArguments) -> None:
    """Sets `bf16` as `precision` says; of "fast" that is measured once for all processes, or as the run was begun in.

    Args:
        args: before TrainingArguments looks at `bf16`; its `precision` becomes "float32" or "bfloat16".

    Raises:
        ValueError: for an unknown precision, and for settings that contradict it.
    """
    check_precision(args.precision)
    if args.fp16 or (args.bf16 and args.precision != "bfloat16"):
        name = "fp16" if args.fp16 else "bf16"
        raise ValueError(f"`precision: {args.precision}` decides what `{name}: true` does, too. Drop one of them.")
    if args.precision == "fast":
        args.precision = _fast(args)
    args.bf16 = args.precision == "bfloat16"
    launched = os.environ.get(BY_THE_LAUNCHER, "no")
    if launched not in ("no", _MIXED[args.precision]):
        raise ValueError(
            f"The launcher asks for mixed precision {launched}, but `precision` is {args.precision}. Launch with "
            f"`--mixed_precision {_MIXED[args.precision]}`, or drop `precision`."
        )


def _fast(args: TrainingArguments) -> str:
    device = args.device  # which makes the processes known to each other
    chosen = [None]
    if args.process_index == 0:
        chosen = [begun_in(args) or resolve_precision("fast", device)]
    if args.world_size > 1:
        broadcast_object_list(chosen)  # one that is alone on its cores might see another machine
    return chosen[0]


def base_model_dtype(precision: str, asked: str) -> str:
    """The dtype of the base model beside a training; a ValueError where another setting asks for one, too."""
    if asked != "auto":
        raise ValueError(f"`precision` decides what `base_model_dtype: {asked}` does, too. Drop one of them.")
    return precision


def begun_in(args: TrainingArguments) -> str | None:
    """The precision of the run that these arguments go on with, by its provenance; None of a new one."""
    checkpoint = args.resume_from_checkpoint
    if args.overwrite_output_dir or checkpoint in (False, "False", "false"):
        return None
    if checkpoint in (None, True, "True", "true"):  # the newest, or the finished training
        checkpoint = latest_checkpoint(args.output_dir) or args.output_dir
    provenance = read_provenance(checkpoint) if Path(checkpoint).is_dir() else None
    settings = (provenance or {}).get("arguments")
    if settings is None:
        return None
    return "bfloat16" if settings.get("bf16") else "float32"
