"""Training of speculators on the Hugging Face Trainer, in the two stages of arXiv 2404.19124."""

from .data import load_rows, pack, split
from .distillation_trainer import DistillationTrainer
from .dry_run import dry_run
from .next_commands import next_commands
from .recipe_parser import parse_recipe
from .run_lock import hold
from .run_record import latest_checkpoint, open_run, read_record
from .run_settings import recipe_settings, training_settings
from .safe_trainer import SafeTrainer
from .speculator_trainer import SpeculatorTrainer
from .speculators import load_or_create_speculator
from .texts import load_texts
from .training_args import DataArguments, ModelArguments, SpeculatorTrainingArguments


__all__ = [
    "DataArguments",
    "DistillationTrainer",
    "ModelArguments",
    "SafeTrainer",
    "SpeculatorTrainer",
    "SpeculatorTrainingArguments",
    "dry_run",
    "hold",
    "latest_checkpoint",
    "load_or_create_speculator",
    "load_rows",
    "load_texts",
    "next_commands",
    "open_run",
    "pack",
    "parse_recipe",
    "read_record",
    "recipe_settings",
    "split",
    "training_settings",
]
