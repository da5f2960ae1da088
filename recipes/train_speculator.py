"""Trains a speculator, stage 1 or 2, from a recipe.

accelerate launch --config_file recipes/accelerate_configs/single.yaml recipes/train_speculator.py \\
    --config recipes/quickstart/stage1.yaml [--key value ...]
accelerate launch --config_file recipes/accelerate_configs/multi_gpu.yaml recipes/train_speculator.py \\
    --config recipes/llama2-7b/stage1.yaml
python recipes/train_speculator.py --config recipes/llama2-7b/stage1.yaml --dry_run
"""

import sys
from dataclasses import asdict

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

from modeling_speculator.command_line import FROM_CHECKPOINT, run, say_end
from modeling_speculator.loading import base_model_config, load_tokenizer
from modeling_speculator.model_cards.provenance_file import trusted_provenance
from modeling_speculator.trainers import (
    DistillationTrainer,
    SpeculatorTrainer,
    dry_run,
    hold,
    load_or_create_speculator,
    load_rows,
    next_commands,
    open_run,
    parse_recipe,
    recipe_settings,
)
from modeling_speculator.trainers.provenance import revision_of
from modeling_speculator.transformers_api import save_model_only


def main() -> None:
    model_args, data_args, args = parse_recipe(sys.argv[1:], description=__doc__)
    if args.dry_run:
        dry_run(sys.argv[1:])
        print("Nothing was trained: the same command does it without --dry_run.")
        return
    with hold(args.output_dir):  # before anything takes long: it is refused at once, or not at all
        settings = recipe_settings(model_args, data_args, args)
        train(model_args, data_args, args, open_run(args.output_dir, settings, args.overwrite_output_dir))


def train(model_args, data_args, args, run) -> None:
    set_seed(args.seed)
    base_model = load_base_model(model_args, args)
    tokenizer = load_tokenizer(model_args.base_model, model_args.base_model_revision)
    speculator = load_or_create_speculator(model_args, base_model)
    with args.main_process_first(desc="tokenizing"):
        train_rows, validation_rows = load_rows(data_args, tokenizer, args.stage, args.seed)

    trainer_class = SpeculatorTrainer if args.stage == 1 else DistillationTrainer
    trainer = trainer_class(
        model=speculator,
        base_model=base_model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        prompt_length=data_args.prompt_length,
        generation_length=data_args.generation_length,
        facts={
            "model": asdict(model_args),
            "data": asdict(data_args),
            "started_from": trusted_provenance(model_args.speculator),
            "base_model_revision": revision_of(model_args.base_model, model_args.base_model_revision),
        },
        run=run,
    )
    if args.stage == 2 and data_args.generated_dataset:
        trainer.write_continuations(data_args.generated_dataset)
    checkpoint = args.resume_from_checkpoint
    if checkpoint in (None, "True", "true"):  # to go on from the newest is what a second run does anyway
        checkpoint = run.latest_checkpoint()
    elif checkpoint in ("False", "false"):
        checkpoint = None
    if checkpoint:
        print(f"Resuming from {checkpoint}.")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    save_model_only(trainer)  # what is pushed is pushed below
    trainer.save_metrics("train", result.metrics)
    if validation_rows is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        say_end(
            f"{args.output_dir}, the speculator; log.jsonl there", then=next_commands(sys.argv[1:], model_args, args)
        )
    trainer.accelerator.end_training()


def load_base_model(model_args, args):
    """The base model, or one with an adapter, in the dtype or the quantization that is asked for."""
    base_model_config(model_args.base_model, model_args.base_model_revision)  # is there, and is one
    options = {}
    if model_args.base_model_quantization is not None:
        config = {
            "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
            "8bit": BitsAndBytesConfig(load_in_8bit=True),
        }[model_args.base_model_quantization]
        options = {"quantization_config": config, "device_map": {"": args.device}}
    return AutoModelForCausalLM.from_pretrained(
        model_args.base_model,
        revision=model_args.base_model_revision,
        dtype=model_args.base_model_dtype,
        **options,
    )


if __name__ == "__main__":
    run(main, FROM_CHECKPOINT)
