"""Which commands come after a training: stage 2 after stage 1, and then what one does with a speculator."""

import os
import shlex
from dataclasses import fields
from pathlib import Path

from ..command_line import command_of, flags_of
from .precision import BY_THE_LAUNCHER
from .recipe_parser import read_recipe, split_config
from .training_args import DataArguments, ModelArguments, SpeculatorTrainingArguments


# Of both stages alike, where the command line sets them.
_PASSED_ON = {"base_model", "base_model_revision", "base_model_dtype", "base_model_quantization"}
_PASSED_ON |= {"precision", "shard_base_model", "use_cpu"}
_PASSED_ON |= {field.name for field in fields(DataArguments)} - {"sequence_length", "separate_documents"}


def next_commands(argv: list[str], model_args: ModelArguments, args: SpeculatorTrainingArguments) -> dict[str, str]:
    """What comes after a training: {what for: a command}; nothing after a stage 1 without a stage2.yaml beside it.

    Args:
        argv: the command line of the training, without the script.
    """
    if args.stage == 1:
        command = _stage_2(argv, args)
        return {"stage 2, on what the base model writes": command} if command else {}
    models = {"base_model": model_args.base_model, "speculator": args.output_dir}
    measured = Path("outputs/acceptance")
    publish = {"speculator": args.output_dir, "repo_id": "ORG/NAME", "version": "1.0.0"}
    return {
        "try it": command_of("generate.py", **models, prompt="Once upon a time", compare=[]),
        "measure it on your prompts": command_of(
            "evaluate_acceptance.py", **models, prompts="PROMPTS.jsonl", output=measured
        ),
        "publish it": command_of("push_to_hub.py", **publish, acceptance=measured / "acceptance.json"),
    }


def _stage_2(argv: list[str], args: SpeculatorTrainingArguments) -> str | None:
    """With the models and the data of this stage 1, as far as its command line set them."""
    flags, recipe = split_config(argv)
    if recipe is None or not Path(recipe).with_name("stage2.yaml").is_file():
        return None
    follows = Path(recipe).with_name("stage2.yaml")
    theirs, ours = read_recipe(str(follows)), read_recipe(recipe)
    more, taken = [], False
    for part in flags:
        if part.startswith("--"):
            taken = part[2:].partition("=")[0].replace("-", "_") in _PASSED_ON
        more += [part] if taken else []
    if theirs.get("speculator") != args.output_dir:
        more += flags_of(speculator=args.output_dir)
    if ours.get("output_dir") != args.output_dir:
        more += flags_of(output_dir=Path(args.output_dir).with_name("speculator"))
    return shlex.join([*_launcher(args), "recipes/train_speculator.py", "--config", str(follows), *more])


def _launcher(args: SpeculatorTrainingArguments) -> list[str]:
    if args.world_size == 1 and BY_THE_LAUNCHER not in os.environ:
        return ["python"]
    config = "single" if args.world_size == 1 else "NAME"  # that of this launch
    return ["accelerate", "launch", "--config_file", f"recipes/accelerate_configs/{config}.yaml"]
