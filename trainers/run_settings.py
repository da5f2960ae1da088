"""Which settings decide what a training makes, as against those that only say how it runs."""

import dataclasses
import json
from pathlib import Path

from transformers import TrainingArguments

from ..measuring.prompts import read_prompts
from . import contents
from .launch import in_main_process
from .provenance import defaults
from .run_record import Settings
from .speculators import check_new_or_given
from .training_args import DataArguments, ModelArguments, SpeculatorTrainingArguments


BATCH = "per_device_train_batch_size x gradient_accumulation_steps x processes"

# What only says how a training runs. Every other setting counts, those of a later transformers, too.
_HOW = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
    *("report_to", "run_name", "project", "disable_tqdm", "debug", "skip_memory_metrics", "enable_jit_checkpoint"),
    *("push_to_hub", "per_device_eval_batch_size", "prediction_loss_only", "batch_eval_metrics", "evaluation_prompts"),
    *("bf16_full_eval", "fp16_full_eval", "use_cpu", "local_rank", "num_processes", "shard_base_model"),
    *("fsdp", "fsdp_config", "parallelism_config", "torch_empty_cache_steps", "use_cache"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("generation_cache", "generation_batch_size"),  # the same text: the noise of a draw belongs to its prompt
}
_HOW_FROM = ("logging_", "log_", "eval_", "save_", "hub_", "ddp_", "trackio_", "dry_run", "do_", "include_")
_HOW_FROM += ("activation_checkpointing", "gradient_checkpointing")
_IN_THE_BATCH = {"per_device_train_batch_size", "gradient_accumulation_steps"}
_IN_CONTENTS = {"base_model_revision", "dataset_revision", "held_out_prompts"}  # other entries stand for them
_UNUSED = {1: {"prompt_length", "generation_length"}, 2: {"sequence_length", "separate_documents"}}  # but to evaluate


def training_settings(args: TrainingArguments, **more) -> Settings:
    """Those among the arguments of a `Trainer`, and whatever else decides: the contents of the data, sizes, ..."""
    values = {key: value for key, value in args.to_dict().items() if key in defaults(args) and not _says_how(key)}
    values[BATCH] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.max_steps > 0:  # which takes their place
        del values["num_train_epochs"]
    unset = {key for key, default in defaults(args).items() if getattr(args, key) == default}
    return Settings(json.loads(json.dumps(values | more, default=str)), frozenset(unset))


def recipe_settings(model: ModelArguments, data: DataArguments, args: SpeculatorTrainingArguments) -> Settings:
    """Those of a recipe; models and data count by what they hold, not by where they lie.

    Raises:
        ValueError: where the recipe contradicts itself; before anything is read.
    """
    check_new_or_given(model)
    known = {key: value for part in (model, data) for key, value in dataclasses.asdict(part).items()}
    known = {key: value for key, value in known.items() if key not in _IN_CONTENTS | _UNUSED[args.stage]}
    known["generated_dataset"] = data.generated_dataset is not None  # whose rows come in an order of their own
    if not data.streaming:
        del known["shuffle_buffer"]
    known |= in_main_process(lambda: _contents(model, data, args))
    settings = training_settings(args, **known)
    unset = {key for part in (model, data) for key, value in defaults(part).items() if getattr(part, key) == value}
    return Settings(settings.values, settings.unset | unset)


def _contents(model: ModelArguments, data: DataArguments, args: SpeculatorTrainingArguments) -> dict:
    known = {"base_model": named(model.base_model, contents.of_model(model.base_model, model.base_model_revision))}
    if model.speculator is not None:
        known["speculator"] = named(model.speculator, contents.of_model(model.speculator))
    if data.dataset is not None:
        found = contents.of_dataset(data.dataset, data.dataset_config, data.dataset_revision)
        known["dataset"] = named(data.dataset, found)
    if data.data_files is not None:
        known["data_files"] = named(", ".join(data.data_files), contents.of_files(data.data_files))
    if data.prompts is not None:
        read = read_prompts(data.prompts), [read_prompts(file) for file in data.held_out_prompts or ()]
        known["prompts"] = named(data.prompts, contents.of_prompts(*read))
    elsewhere = args.resume_from_checkpoint
    if elsewhere is not None and Path(elsewhere).is_dir() and not lies_in(elsewhere, args.output_dir):
        known["resume_from_checkpoint"] = named(elsewhere, contents.of_model(elsewhere))
    return known


def named(name: str, holds: str) -> dict:
    """A setting that counts by what it holds; the name is for people."""
    return {"name": str(name), "holds": holds}


def lies_in(checkpoint: str | Path, output_dir: str | Path) -> bool:
    return Path(checkpoint).resolve().parent == Path(output_dir).resolve()


def _says_how(key: str) -> bool:
    return key in _HOW | _IN_THE_BATCH or key.startswith(_HOW_FROM)
