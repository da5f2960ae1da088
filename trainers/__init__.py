"""Training of speculators on the Hugging Face Trainer, in the two stages of arXiv 2404.19124."""

from .checkpoints import SafeTrainer, latest_checkpoint
from .data import load_rows, pack, split
from .distillation_trainer import DistillationTrainer
from .dry_run import dry_run
from .speculator_trainer import SpeculatorTrainer
from .speculators import load_or_create_speculator
from .texts import load_texts
from .training_args import DataArguments, ModelArguments, SpeculatorTrainingArguments, parse_recipe


__all__ = [
    "DataArguments",
    "DistillationTrainer",
    "ModelArguments",
    "SafeTrainer",
    "SpeculatorTrainer",
    "SpeculatorTrainingArguments",
    "dry_run",
    "latest_checkpoint",
    "load_or_create_speculator",
    "load_rows",
    "load_texts",
    "pack",
    "parse_recipe",
    "split",
]
