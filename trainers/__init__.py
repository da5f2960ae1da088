"""Training of speculators on the Hugging Face Trainer, in the two stages of arXiv 2404.19124."""

from .checkpoints import latest_checkpoint
from .data import load_texts, pack, split
from .distillation_trainer import DistillationTrainer
from .speculator_trainer import SpeculatorTrainer
from .training_args import DataArguments, ModelArguments, SpeculatorTrainingArguments, parse_recipe


__all__ = [
    "DataArguments",
    "DistillationTrainer",
    "ModelArguments",
    "SpeculatorTrainer",
    "SpeculatorTrainingArguments",
    "latest_checkpoint",
    "load_texts",
    "pack",
    "parse_recipe",
    "split",
]
