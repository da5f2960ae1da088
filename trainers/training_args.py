"""What a recipe can set, and what is wrong of it. The parser is in recipe_parser.py."""

import math
from dataclasses import Field, dataclass, field

import torch
from transformers import TrainingArguments

from ..configuration_mlp_speculator import MLPSpeculatorConfig
from ..loading import check_dtype
from .losses import DISTRIBUTION_LOSSES, LOSSES
from .precision import settle_precision


def option(default, unit: str | None, help: str) -> Field:
    """A field of a recipe, of which its help says a unit and a default.

    Args:
        default: with None, `help` ends in what happens then: "(default: all)".
        unit: what a value is counted in, or what it is; None of a switch.
    """
    about = {"help": help} | ({} if unit is None else {"metavar": unit})
    return field(default=default, metadata=about)


_NEW = MLPSpeculatorConfig()  # what a new speculator is, where a recipe says nothing


@dataclass
class ModelArguments:
    """Which models are trained. The numbers are those of a new speculator; null keeps the config's default."""

    base_model: str = field(metadata={"metavar": "FOLDER_OR_ID", "help": "the base model; it is never changed"})
    base_model_revision: str | None = option(None, "REVISION", "branch, tag or commit of it (default: the newest)")
    base_model_dtype: str = option("auto", "DTYPE", "auto (as it was saved), bfloat16, float32, ...")
    base_model_quantization: str | None = option(
        None, "BITS", "4bit or 8bit, by bitsandbytes, for one that would not fit (default: none)"
    )
    speculator: str | None = option(None, "FOLDER_OR_ID", "a speculator to start from (default: a new one)")
    n_predict: int | None = option(None, "HEADS", f"of a new speculator (default: {_NEW.n_predict})")
    inner_dim: int | None = option(None, "WIDTH", "of a new one's state (default: the base model's)")
    top_k_tokens_per_head: list[int] | None = option(
        None, "TOKENS", f"children per node (default: {' '.join(map(str, _NEW.top_k_tokens_per_head))} ...)"
    )
    n_candidates: int | None = option(
        None, "CANDIDATES", f"drafted sequences to verify (default: {_NEW.n_candidates})"
    )
    method: str | None = option(
        None,
        "METHOD",
        "sum_rnn (published), sum_lstm (gated), residual, context, eagle, hydra, redrafter, streaming, medusa or "
        "unconditioned "
        f"(default: {_NEW.method})",
    )
    feature_layers: list[int] | None = option(
        None, "LAYERS", "methods context, eagle: of the base model, from 0, to read what enters them (default: none)"
    )
    context_heads: int | None = option(None, "HEADS", "likewise: of its attention (default: one for 64 numbers)")
    context_kv_heads: int | None = option(
        None, "HEADS", "method eagle: of keys and values (default: one for each of queries)"
    )
    context_inner_dim: int | None = option(None, "WIDTH", "likewise: of its SwiGLU (default: twice the base model's)")
    n_blocks: int | None = option(
        None, "BLOCKS", "methods hydra, redrafter: residual blocks of a head (default: 1; redrafter 2)"
    )
    prefix_layer: bool | None = option(
        None, "true|false", "method hydra: behind a decoder layer, as Hydra++ (default: false)"
    )
    n_stream_layers: int | None = option(
        None, "LAYERS", "method streaming: of the base model, that streams run through (default: the last quarter)"
    )
    stream_lora_rank: int | None = option(
        None, "RANK", "likewise: of the adapters on the layers' products, 0 for none (default: 8)"
    )
    exit_rank: int | None = option(
        None, "RANK", "likewise: of a head that can prune trees below the streams (default: 0, none)"
    )
    shared_adapter: bool | None = option(
        None,
        "true|false",
        "likewise: they act on the main stream, too: the base model's text changes (default: false)",
    )
    tie_weights: bool | None = option(None, "true|false", "share the weights among the heads (default: false)")
    scale_input: bool | None = option(None, "true|false", "normalise the context vector (default: false)")
    tie_to_base_model: bool = option(
        False, None, "the base model's embeddings and LM head, frozen, serve as those of all heads"
    )
    lora_rank: int | None = option(
        None, "RANK", "of a LoRA adapter on `speculator`, to train in its place (default: no adapter)"
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

    dataset: str | None = option(None, "FOLDER_OR_ID", "a dataset ... (default: none; then name data_files)")
    dataset_config: str | None = option(None, "NAME", "... its configuration (default: its only one)")
    dataset_split: str = option("train", "NAME", "... and its split")
    dataset_revision: str | None = option(None, "REVISION", "branch, tag or commit of it (default: the newest)")
    data_files: list[str] | None = option(None, "FILE", "text, jsonl or parquet, or patterns (default: none)")
    streaming: bool = option(False, None, "read while training, instead of downloading it first")
    shuffle_buffer: int = option(10_000, "TEXTS", "streaming: to draw the next one from")
    text_column: str = option("text", "NAME", "of the column of texts, or of lists of chat messages")
    separate_documents: bool = option(True, None, "no attention between the documents that share a sequence")
    validation_fraction: float = option(0.01, "SHARE", "of the sequences held out; 0: none ...")
    validation_sequences: int = option(256, "SEQUENCES", "... but no more than these; of a stream, exactly these")
    sequence_length: int = option(4096, "TOKENS", "stage 1: of a sequence")
    prompt_length: int = option(64, "TOKENS", "stage 2 and evaluation: of a prompt; the most, of whole `prompts`")
    generation_length: int = option(256, "TOKENS", "stage 2 and evaluation: generated after a prompt")
    prompts: str | None = option(
        None, "FILE", "stage 2, in place of a dataset: whole prompts, in the chat template if any (default: none)"
    )
    held_out_prompts: list[str] | None = option(
        None, "FILE", "prompts to measure on: of those to train on, the same ones are left out (default: none)"
    )
    generated_dataset: str | None = option(
        None, "FOLDER", "stage 2: keeps the continuations; what is there is trained on (default: none)"
    )

    def __post_init__(self):
        lengths = ("validation_sequences", "sequence_length", "prompt_length", "generation_length", "shuffle_buffer")
        for name in lengths:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}.")
        if self.prompts is not None and (self.dataset, self.data_files) != (None, None):
            raise ValueError("Whole `prompts` are trained on in place of a `dataset` and `data_files`: drop those.")
        if self.held_out_prompts and self.prompts is None:
            raise ValueError("`held_out_prompts` are left out of `prompts`: name these, too.")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must be from 0 to below 1, but is {self.validation_fraction}.")


@dataclass
class SpeculatorTrainingArguments(TrainingArguments):
    """TrainingArguments with the defaults of the published recipe (arXiv 2404.19124 and fms-fsdp)."""

    stage: int = option(1, "STAGE", "1: on text; 2: on what the base model itself generates")
    loss: list[str] = field(
        default_factory=lambda: ["cross_entropy"],
        metadata={"metavar": "LOSS", "help": f"one or a mix of {', '.join(LOSSES)}"},
    )
    loss_weights: list[float] | None = option(None, "WEIGHT", "of each of `loss` (default: 1 each)")
    head_weights: list[float] | None = option(None, "WEIGHT", "of each head's loss (default: 1 each)")
    unrolled_share: float = option(
        0.0, "SHARE", "how often a head gets the choice of the head before it, not the truth"
    )
    hidden_state_noise: float = option(
        0.0, "NUMBER", "noise on the context vectors, in units of their root mean square"
    )
    target_temperature: float = option(1.0, "NUMBER", "of the base model's distribution, for the losses on it")
    target_top_k: int | None = option(None, "TOKENS", "likewise: its most probable ones (default: all)")
    generation_temperature: float = option(1.0, "NUMBER", "of the continuations that are sampled")
    generation_top_k: int = option(10, "TOKENS", "likewise: the most probable ones to sample from")
    generation_cache: str | None = option(
        None, "CACHE", "static (compiled on a GPU) or dynamic (default: static on a GPU)"
    )
    generation_batch_size: int | None = option(
        None, "PROMPTS", "continued at once on a GPU (default: per_device_train_batch_size)"
    )
    generation_seed: int | None = option(None, "NUMBER", "of the continuations (default: that of the training)")
    hub_version: str | None = option(
        None, "VERSION", "with push_to_hub: 1.0.0 tags what is pushed at the end as v1.0.0 (default: no tag)"
    )
    evaluation_prompts: int = option(64, "PROMPTS", "held out, to measure tokens per step on; 0: don't")
    precision: str | None = option(
        None,
        "PRECISION",
        "of the training and its base model: float32, bfloat16, or fast, which of them is on this machine; a run that "
        "goes on keeps its own (default: as `bf16`, `fp16` and `base_model_dtype` say)",
    )
    save_minutes: float | None = option(
        None, "MINUTES", "save, too, when so many have passed since the last save (default: don't)"
    )
    shard_base_model: bool = option(False, None, "a share of each of its weights on every GPU")
    num_processes: int | None = option(None, "PROCESSES", "refuse to run with another number (default: any)")
    parabolic_schedule: bool = option(
        True, None, "parabolic warm-up and a cosine to a tenth of the peak, in place of lr_scheduler_type"
    )
    overwrite_output_dir: bool = option(False, None, "delete the training that lies in output_dir, and begin anew")
    dry_run: bool = option(False, None, "check shapes and print sizes, memory and cost; train nothing")
    dry_run_gpus: int | None = option(
        None, "GPUS", "that a dry run reckons with (default: those that are here, or 8 H100s)"
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
