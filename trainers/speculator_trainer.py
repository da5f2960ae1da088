"""Stage 1: a speculator learns to predict text from the context vectors of a base model that reads it."""

import math
import time
from collections.abc import Sized
from functools import partial
from operator import mul

import torch
from transformers import PreTrainedModel

from ..checks import check_shapes
from ..families import output_logits
from .acceptance import ExpectedAcceptance
from .alignment import TrainingBatch, align
from .base_model import check_output_logits, check_separation, read
from .checkpoints import SafeTrainer, latest_checkpoint
from .continuations import ContinuationSampler
from .distribution import are_finite, check_distribution, is_sharded, place_base_model
from .metrics import HeadWindow, Stopwatch, head_metrics
from .objective import Objective
from .provenance import known_before, seconds_in, write_provenance
from .schedules import parabolic_cosine_schedule
from .training_args import SpeculatorTrainingArguments


class SpeculatorTrainer(SafeTrainer):
    """Trains a speculator on sequences of `input_ids`, beside a frozen base model.

    Args:
        model: the speculator, or a peft model around one.
        base_model: a causal language model, put where the training runs and never changed; it is not part of `model`.
        args, train_dataset, ...: as for `Trainer`. A dataset needs a column `input_ids` of rows of equal length, and
            may have `position_ids` that start again with each document: these are then kept apart.
        prompt_length, generation_length: tokens of the prompts that are cut from the evaluation data, and of what the
            base model writes after them, to measure `eval_tokens_per_step` on.
        facts: what else `provenance.json` shall say, in JSON's types.

    Raises:
        ValueError: if base model and speculator don't fit together, the sequences are too short for the heads, or the
            processes are not those that were asked for.
    """

    loss_is_scaled_for_ga = False  # a mean over the micro-batch

    def __init__(
        self,
        model: PreTrainedModel,
        base_model: PreTrainedModel,
        args: SpeculatorTrainingArguments,
        prompt_length: int = 64,
        generation_length: int = 256,
        facts: dict | None = None,
        **kwargs,
    ):
        check_shapes(base_model, model)
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs. Start it with `accelerate launch`, one process each."
            )
        for name in ("train_dataset", "eval_dataset"):
            if isinstance(kwargs.get(name), Sized) and len(kwargs[name]) == 0:
                raise ValueError(f"`{name}` has no rows. Give it some, or None.")
        kwargs.setdefault("compute_metrics", head_metrics)
        super().__init__(model=model, args=args, **kwargs)
        check_distribution(self.accelerator, args.num_processes)
        self.base_model = place_base_model(base_model, self.accelerator, args.shard_base_model)
        config = model.config
        self.n_predict = config.n_predict
        self.objective = Objective(
            losses=args.loss,
            loss_weights=args.weights_of("loss_weights", len(args.loss)),
            head_weights=args.weights_of("head_weights", config.n_predict),
            top_k=config.top_k_tokens_per_head,
            unrolled_share=args.unrolled_share,
            hidden_state_noise=args.hidden_state_noise,
        )
        if self.objective.needs_distribution:
            check_output_logits(self.base_model, args.device)
        if any("position_ids" in (getattr(data, "column_names", None) or ()) for data in self._datasets()):
            check_separation(self.base_model, args.device)
        self.prompt_length = prompt_length
        self.generation_seed = args.seed if args.generation_seed is None else args.generation_seed
        # Compiled where it pays; what gathers sharded weights can't be.
        is_fast = args.device.type == "cuda" and not is_sharded(self.base_model)
        cache = args.generation_cache or ("static" if is_fast else "dynamic")

        def sampler(temperature: float) -> ContinuationSampler:
            return ContinuationSampler(self.base_model, generation_length, temperature, args.generation_top_k, cache)

        self.sampler = sampler(args.generation_temperature)
        self.acceptance = ExpectedAcceptance(
            {"tokens_per_step": sampler(0.0), "tokens_per_step_sampled": self.sampler},
            self.accelerator,
            args.evaluation_prompts,
            prompt_length,
            self.generation_seed,
        )
        self.heads, self.watch = HeadWindow(), Stopwatch(args.device)
        self.facts = known_before(args, base_model, model) | (facts or {})
        self.seconds_before, self.started = 0.0, time.perf_counter()

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "position_ids", "continuation"]

    def _datasets(self) -> list:
        return [data for data in (self.train_dataset, self.eval_dataset) if data is not None]

    # What is trained on

    def batch(self, inputs: dict[str, torch.Tensor]) -> TrainingBatch:
        """Stage 1: all of the text, from its first token on.

        The first `n_predict` + 1 tokens of a document are no targets where another comes before it in the sequence:
        some head would have to guess them from that one.
        """
        text, position_ids = inputs["input_ids"], inputs.get("position_ids")
        labels = text
        if position_ids is not None:
            begins_at = torch.arange(text.shape[1], device=text.device) - position_ids
            labels = text.masked_fill((begins_at > 0) & (position_ids <= self.n_predict), -100)
        with self.watch.measure("base_model", text.numel()):
            states = read(self.base_model, text[:, :-1], None if position_ids is None else position_ids[:, :-1])
        return align(states, text[:, 1:], labels[:, 1:], self.n_predict)

    # A step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = self.batch(inputs)
        outputs = model(
            batch.hidden_states,
            batch.input_ids,
            batch.labels,
            objective=partial(
                self.objective,
                next_states=batch.next_states,
                base_logits=partial(output_logits, self.base_model),
                training=model.training,
                counted_everywhere=self._mean_over_processes if model.training else None,
            ),
        )
        if model.training:
            self.heads.add(outputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _mean_over_processes(self, counted: torch.Tensor) -> torch.Tensor:
        """So that the mean of the processes' losses is that of one process with all of their rows."""
        if self.accelerator.num_processes == 1:
            return counted
        return self.accelerator.reduce(counted.float(), reduction="mean")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._read_window() | self.watch.rates(self.accelerator.num_processes)
        super().log(logs, start_time)

    def _read_window(self) -> dict[str, float]:
        means = self.heads.read(partial(self.accelerator.reduce, reduction="sum"))
        self._require(all(map(math.isfinite, means.values())))
        return means

    def _require(self, finite: bool) -> None:
        """Stops a run whose loss or weights are not finite, in all processes together."""
        broken = torch.tensor(0.0 if finite else 1.0, device=self.args.device)
        if self.accelerator.reduce(broken, reduction="sum") > 0:
            raise ValueError(
                f"The loss is not finite at step {self.state.global_step}. Nothing was saved since the last complete "
                f"checkpoint, {latest_checkpoint(self.args.output_dir)}. Lower `learning_rate`, or check the data and "
                "the base model's dtype: float16 overflows where bfloat16 does not."
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = latest_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            self.seconds_before = seconds_in(resume_from_checkpoint)
        self.started = time.perf_counter()
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self._read_window()  # of the steps since the last log
        return result

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None and self.args.parabolic_schedule:
            self.lr_scheduler = parabolic_cosine_schedule(
                optimizer or self.optimizer, self.args.get_warmup_steps(num_training_steps), num_training_steps
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the speculator, and beside it where it comes from."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            seconds = self.seconds_before + time.perf_counter() - self.started
            progress = {"steps": self.state.global_step, "seconds": round(seconds, 1)}
            write_provenance(output_dir or self.args.output_dir, self.facts | progress)

    def _save_checkpoint(self, model, trial) -> None:
        """Keeps nothing of a run that has gone wrong."""
        self._require(self.heads.is_finite() and are_finite(self.model))
        super()._save_checkpoint(model, trial)

    # Evaluation

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        """Adds `tokens_per_step`, and uses up none of the training's random numbers."""
        devices = [] if self.args.device.type == "cpu" else [self.args.device]
        with torch.random.fork_rng(devices):
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.compute_metrics is head_metrics:  # Trainer's own is a mean over batches, whatever counts in each
            by_head = [output.metrics[f"{metric_key_prefix}_loss_head_{head + 1}"] for head in range(self.n_predict)]
            output.metrics[f"{metric_key_prefix}_loss"] = sum(map(mul, by_head, self.objective.head_weights))
        if self.args.evaluation_prompts:
            measured = self.acceptance.measure(self.model, dataloader.dataset)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        self.watch = Stopwatch(self.args.device)  # the time since the last log was not all spent in training
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        of_rows = (outputs.row_losses, outputs.correct, outputs.correct_top_k)
        return loss, tuple(values.contiguous() for values in of_rows), outputs.counted.contiguous()
