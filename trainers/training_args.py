"""What a recipe can set: one flat YAML file a stage, every key also a `--key value` flag."""

import difflib
import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..loading import check_dtype
from ..transformers_api import dict_arguments
from .losses import DISTRIBUTION_LOSSES, LOSSES
from .precision import base_model_dtype, settle_precision


@dataclass
class ModelArguments:
    """Which models are trained. The numbers are those of a new speculator; null keeps the config's default."""

    base_model: str = field(metadata={"help": "Folder or Hub id of the base model; it is never changed."})
    base_model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of it."})
    base_model_dtype: str = field(default="auto", metadata={"help": '"auto" (as saved), "bfloat16", "float32", ...'})
    base_model_quantization: str | None = field(
        default=None, metadata={"help": '"4bit" or "8bit", by bitsandbytes: a base model that would not fit.'}
    )
    speculator: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a speculator to start from. Null: a new one."}
    )
    n_predict: int | None = field(default=None, metadata={"help": "Heads."})
    inner_dim: int | None = field(default=None, metadata={"help": "Width of the state; null: the base model's."})
    top_k_tokens_per_head: list[int] | None = field(default=None, metadata={"help": "Children per node."})
    n_candidates: int | None = field(default=None, metadata={"help": "Drafted sequences to verify."})
    method: str | None = field(
        default=None, metadata={"help": '"sum_rnn" (published), "sum_lstm" (gated), "medusa" or "unconditioned".'}
    )
    tie_weights: bool | None = field(default=None, metadata={"help": "Share the weights among the heads."})
    scale_input: bool | None = field(default=None, metadata={"help": "Normalise the context vector."})
    tie_to_base_model: bool = field(
        default=False,
        metadata={"help": "The base model's embeddings and LM head, frozen, serve as those of all heads."},
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "Train a LoRA adapter of this rank on `speculator` instead of its weights."}
    )

    def __post_init__(self):
        if self.base_model_quantization not in (None, "4bit", "8bit"):
            raise ValueError(
                f'`base_model_quantization` must be "4bit" or "8bit", not {self.base_model_quantization!r}.'
            )
        check_dtype(self.base_model_dtype)


@dataclass
class DataArguments:
    """Which texts are trained on, and how they are cut."""

    dataset: str | None = field(default=None, metadata={"help": "Hub id or folder of a dataset ..."})
    dataset_config: str | None = field(default=None, metadata={"help": "... its configuration"})
    dataset_split: str = field(default="train", metadata={"help": "... and its split."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of it."})
    data_files: list[str] | None = field(default=None, metadata={"help": "... or text, jsonl or parquet files."})
    streaming: bool = field(default=False, metadata={"help": "Read while training, instead of downloading it first."})
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Streaming: texts to draw the next one from."})
    text_column: str = field(default="text", metadata={"help": "Column of texts, or of lists of chat messages."})
    separate_documents: bool = field(
        default=True, metadata={"help": "No attention between the documents that share a sequence."}
    )
    validation_fraction: float = field(
        default=0.01, metadata={"help": "Share of the sequences held out (0: none) ..."}
    )
    validation_sequences: int = field(
        default=256, metadata={"help": "... but no more than these; of a stream, exactly these."}
    )
    sequence_length: int = field(default=4096, metadata={"help": "Tokens of a stage-1 sequence."})
    prompt_length: int = field(default=64, metadata={"help": "Stage 2 and evaluation: tokens of a prompt."})
    generation_length: int = field(default=256, metadata={"help": "Stage 2 and evaluation: tokens generated after."})
    generated_dataset: str | None = field(
        default=None, metadata={"help": "Stage 2: a folder to keep the continuations in; what is there is trained on."}
    )

    def __post_init__(self):
        lengths = ("validation_sequences", "sequence_length", "prompt_length", "generation_length", "shuffle_buffer")
        for name in lengths:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}.")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must be from 0 to below 1, but is {self.validation_fraction}.")


@dataclass
class SpeculatorTrainingArguments(TrainingArguments):
    """TrainingArguments with the defaults of the published recipe (arXiv 2404.19124 and fms-fsdp)."""

    stage: int = field(default=1, metadata={"help": "1: on text; 2: on what the base model itself generates."})
    loss: list[str] = field(
        default_factory=lambda: ["cross_entropy"], metadata={"help": f"One or a mix of {', '.join(LOSSES)}."}
    )
    loss_weights: list[float] | None = field(default=None, metadata={"help": "Of each of `loss`; null: 1."})
    head_weights: list[float] | None = field(default=None, metadata={"help": "Of each head's loss; null: 1."})
    unrolled_share: float = field(
        default=0.0, metadata={"help": "Probability that a head gets the choice of the head before, not the truth."}
    )
    hidden_state_noise: float = field(
        default=0.0, metadata={"help": "Noise on the context vectors, in units of their root mean square."}
    )
    target_temperature: float = field(
        default=1.0, metadata={"help": "Of the base model's distribution, for the losses on it."}
    )
    target_top_k: int | None = field(
        default=None, metadata={"help": "Likewise: the most probable tokens of it; null: all."}
    )
    generation_temperature: float = field(default=1.0, metadata={"help": "Of the continuations that are sampled."})
    generation_top_k: int = field(default=10, metadata={"help": "Likewise."})
    generation_cache: str | None = field(
        default=None, metadata={"help": '"static" (compiled on a GPU) or "dynamic"; null: static on a GPU.'}
    )
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Prompts continued at once on a GPU; null: per_device_train_batch_size."}
    )
    generation_seed: int | None = field(
        default=None, metadata={"help": "Of the continuations; null: that of the training."}
    )
    hub_version: str | None = field(
        default=None, metadata={"help": 'With push_to_hub: "1.0.0" tags what is pushed at the end as v1.0.0.'}
    )
    evaluation_prompts: int = field(
        default=64, metadata={"help": "Held-out prompts to measure tokens per step on; 0: don't."}
    )
    precision: str | None = field(
        default=None,
        metadata={
            "help": 'Of the training and its base model: "float32", "bfloat16", or "fast", which of them is on this '
            "machine; a run that goes on keeps its own. Null: `bf16`, `fp16` and `base_model_dtype` decide."
        },
    )
    save_minutes: float | None = field(
        default=None, metadata={"help": "Save, too, when so many minutes have passed since the last save."}
    )
    shard_base_model: bool = field(default=False, metadata={"help": "A share of each of its weights on every GPU."})
    num_processes: int | None = field(default=None, metadata={"help": "Refuse to run with another number of them."})
    parabolic_schedule: bool = field(
        default=True,
        metadata={"help": "Parabolic warm-up and a cosine to a tenth of the peak, in place of lr_scheduler_type."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the training that lies in output_dir, and begin anew."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Check shapes and print sizes, memory and cost; train nothing."}
    )
    dry_run_gpus: int | None = field(
        default=None, metadata={"help": "The GPUs that a dry run reckons with; null: those that are here, or 8 H100s."}
    )
    learning_rate: float = 1e-3
    adam_beta2: float = 0.95
    weight_decay: float = 0.1
    logging_nan_inf_filter: bool = False  # it would hide them, and wait for the device at each step to do so
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self):
        if not torch.accelerator.is_available():  # otherwise bf16 on a CPU is refused
            self.use_cpu = True
        if self.precision is not None:
            settle_precision(self)
        super().__post_init__()
        if self.stage not in (1, 2):
            raise ValueError(f"`stage` must be 1 (on text) or 2 (on generated text), but is {self.stage}.")
        if self.parabolic_schedule and (self.lr_scheduler_type != "linear" or self.lr_scheduler_kwargs):
            raise ValueError(
                f"`lr_scheduler_type={self.lr_scheduler_type}` or its kwargs are set while `parabolic_schedule` takes "
                "their place: set `parabolic_schedule: false`."
            )
        unknown = sorted(set(self.loss) - set(LOSSES))
        if unknown or not self.loss:
            raise ValueError(f"`loss` must name one or more of {', '.join(LOSSES)}, but is {self.loss}.")
        self.weights_of("loss_weights", len(self.loss))
        if (self.target_temperature, self.target_top_k) != (1.0, None) and not DISTRIBUTION_LOSSES.keys() & self.loss:
            raise ValueError(
                f"`target_temperature` and `target_top_k` are for the losses {', '.join(DISTRIBUTION_LOSSES)}, but "
                f"`loss` is {self.loss}: name one of those, or drop the target's settings."
            )
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"`max_steps` must be at least 1, or -1 for `num_train_epochs`, but is {self.max_steps}.")
        for name, low, high in (
            ("per_device_train_batch_size", 1, math.inf),
            ("gradient_accumulation_steps", 1, math.inf),
            ("learning_rate", 0, math.inf),
            ("dry_run_gpus", 1, math.inf),
            ("unrolled_share", 0, 1),
            ("hidden_state_noise", 0, math.inf),
            ("target_temperature", 1e-4, math.inf),
            ("target_top_k", 1, math.inf),
            ("generation_temperature", 1e-4, math.inf),
            ("generation_top_k", 1, math.inf),
            ("evaluation_prompts", 0, math.inf),
            ("save_minutes", 0, math.inf),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"`{name}` must be between {low} and {high}, but is {value}.")
        if self.generation_cache not in (None, "static", "dynamic"):
            raise ValueError(f'`generation_cache` must be "static" or "dynamic", but is {self.generation_cache!r}.')

    def weights_of(self, name: str, n: int) -> list[float]:
        """`loss_weights` or `head_weights`, 1 where unset; a ValueError where there are not n of them."""
        weights = getattr(self, name)
        if weights is not None and (len(weights) != n or min(weights) < 0 or not any(weights)):
            raise ValueError(f"`{name}` needs {n} numbers of at least 0, not all of them 0, but is {weights}.")
        return weights or [1.0] * n


class _RecipeParser(HfArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message}. See `--help` for all keys.")


def parse_recipe(
    args: list[str],
) -> tuple[ModelArguments, DataArguments, SpeculatorTrainingArguments]:
    """Parses `--config recipe.yaml --key value ...`; a flag wins over the file.

    Raises:
        ValueError: for a key that does not exist (the nearest one is named), for a value of another type, and for keys
            that contradict each other.
    """
    classes = (ModelArguments, DataArguments, SpeculatorTrainingArguments)
    parser = _RecipeParser(classes, allow_abbrev=False)
    flags = {option: action for action in parser._actions for option in action.option_strings}
    known = {f.name for cls in classes for f in fields(cls) if f.init}

    args, path = split_config(args)
    recipe = {} if path is None else _read(path, known)
    for at, arg in reversed(list(enumerate(args))):
        if arg.startswith("--") and arg != "--help":
            key, _, value = arg[2:].partition("=")
            key = key.replace("-", "_")
            if f"--{key}" in flags and key not in known:  # of a switch: no_...
                key = key.removeprefix("no_")
            _check_key(key, known, "the command line")
            recipe.pop(key, None)
            if value == "null" or (not value and args[at + 1 : at + 2] == ["null"]):
                args[at : at + (1 if value else 2)] = []

    for key, value in recipe.items():
        if value is False and "no" in (flags[f"--{key}"].choices or ()):
            value = "no"  # which YAML takes for false
        args = _as_flags(key, value, takes_list=flags[f"--{key}"].nargs == "+") + args
    *parsed, unknown = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"Values without a key: {unknown}. Options are written `--key value`.")
    model, _, training = parsed
    if training.precision is not None:
        model.base_model_dtype = base_model_dtype(training.precision, model.base_model_dtype)
    return tuple(parsed)


def split_config(args: list[str]) -> tuple[list[str], str | None]:
    """A command line without its `--config FILE` or `--config=FILE`, and that file."""
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" not in args:
        return args, None
    at = args.index("--config")
    if at + 1 == len(args):
        raise ValueError("`--config` needs the path of a YAML file.")
    return args[:at] + args[at + 2 :], args[at + 1]


def _read(path: str, known: Collection[str]) -> dict:
    """The keys of a YAML file that are set; null means unset, the default."""
    if not Path(path).is_file():
        raise ValueError(f"`--config {path}`: there is no such file.")
    recipe = yaml.load(Path(path).read_text(), Loader=_RecipeLoader)
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold `key: value` lines.")
    for key in recipe:
        _check_key(key, known, path)
    return {key: value for key, value in recipe.items() if value is not None}


def _as_flags(key: str, value, takes_list: bool) -> list[str]:
    """A line of YAML as the flags that say the same, so that both are converted and checked by one parser."""
    if isinstance(value, dict) and key in dict_arguments():
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, list) and takes_list and not any(isinstance(item, (dict, list)) for item in value):
        return [f"--{key}", *map(str, value)]
    if isinstance(value, (dict, list)):
        raise ValueError(f"`{key}` takes {'a flat list' if takes_list else 'one value'}, but is {value}.")
    return [f"--{key}={value}"]


def _check_key(key: str, known: Collection[str], where: str) -> None:
    if key not in known:
        nearest = difflib.get_close_matches(str(key), known, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else " See `--help` for all keys."
        raise ValueError(f"Unknown key {key!r} in {where}.{hint}")


class _RecipeLoader(yaml.SafeLoader):
    """YAML that knows 1e-3 to be a number, and refuses a key that is given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise ValueError(f"Keys given twice: {sorted(twice)}. Keep one of each.")
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
