"""Stage 1: a speculator learns to predict text from the context vectors of a base model that reads it."""

import math
import time
from collections.abc import Sized
from functools import partial
from operator import mul

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..cells import Cell
from ..checks import check_positions, check_shapes
from ..families import output_logits
from ..model_cards.provenance_file import is_about, read_provenance, weights_in, write_provenance
from ..transformers_api import own_lr_scheduler, prepare_inputs
from .acceptance import ExpectedAcceptance
from .alignment import TrainingBatch, align, known_labels
from .base_model import check_output_logits, check_separation, read
from .checkpoints import steps_in
from .continuations import ContinuationSampler
from .distribution import are_finite, check_distribution, is_sharded, place_base_model, prepare_fsdp
from .metrics import HeadWindow, Stopwatch, head_metrics
from .objective import Objective, counted_labels
from .pace import TimedSaves
from .provenance import known_before, with_segments
from .publishing import PublishingTrainer
from .schedules import parabolic_cosine_schedule
from .training_args import SpeculatorTrainingArguments


class SpeculatorTrainer(PublishingTrainer):
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
        _check_data(kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
        if generation_length <= model.config.n_predict:
            raise ValueError(
                f"`generation_length={generation_length}` is too short for {model.config.n_predict} heads, which need "
                f"{model.config.n_predict + 1} tokens."
            )
        kwargs.setdefault("compute_metrics", head_metrics)
        super().__init__(model=model, args=args, **kwargs)
        if args.save_minutes is not None:
            self.add_callback(TimedSaves(args.save_minutes))
        check_distribution(self.accelerator, args.num_processes)
        prepare_fsdp(model, self.accelerator)
        facts = known_before(args, base_model, model) | (facts or {})
        self.base_model = place_base_model(base_model, self.accelerator, args.shard_base_model)
        cell = check_layers_of_the_base_model(model, self.base_model)
        # Of the base model, for a context layer: what enters them; None for heads that read context vectors alone.
        self.feature_layers = cell.feature_layers if cell.reads_text else None
        config = model.config
        self.n_predict, self.vocab_size = config.n_predict, config.vocab_size
        self.objective = Objective(
            losses=args.loss,
            loss_weights=args.weights_of("loss_weights", len(args.loss)),
            head_weights=args.weights_of("head_weights", config.n_predict),
            top_k=config.top_k_tokens_per_head,
            unrolled_share=args.unrolled_share,
            hidden_state_noise=args.hidden_state_noise,
            target_temperature=args.target_temperature,
            target_top_k=args.target_top_k,
        )
        if self.objective.needs_distribution or self.objective.needs_choices:
            check_output_logits(self.base_model, args.device)
        for data in self._datasets()[1:]:
            if data is not None:
                prompt = min(prompt_length, len(data[0]["input_ids"]))
                check_positions(self.base_model, prompt + generation_length)
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
            self.feature_layers,
            shows_bar=not args.disable_tqdm,
        )
        self.heads, self.watch = HeadWindow(), Stopwatch(args.device)
        self.facts, self.seconds, self.started = facts, 0.0, None  # seconds of training, but for those since `started`
        self.checkpoint, self.before = None, None  # that it went on from, and what was known of that
        self._divisor = None  # of the sums of losses of a step's micro-batches

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "position_ids", "attention_mask", "continuation"]

    def _datasets(self) -> list:
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return [self.train_dataset, *evaluated]

    # What is trained on

    def batch(self, inputs: dict[str, torch.Tensor]) -> TrainingBatch:
        """Stage 1: all of the text, from its first token on."""
        text, position_ids = inputs["input_ids"], inputs.get("position_ids")
        with self.watch.measure("base_model", text.numel()):
            positions = None if position_ids is None else position_ids[:, :-1]
            reading = read(self.base_model, text[:, :-1], positions, feature_layers=self.feature_layers or ())
        segments = None if positions is None else (positions == 0).cumsum(-1)
        return align(reading, text[:, 1:], self.labels(inputs), self.n_predict, segments)

    def labels(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The tokens after the first one, with -100 in place of those that are no targets.

        The first `n_predict` + 1 tokens of a document are none where another comes before it in the sequence: some
        head would have to guess them from that one.
        """
        text, position_ids = inputs["input_ids"], inputs.get("position_ids")
        if position_ids is None:
            return text[:, 1:]
        begins_at = torch.arange(text.shape[1], device=text.device) - position_ids
        return text.masked_fill((begins_at > 0) & (position_ids <= self.n_predict), -100)[:, 1:]

    # A step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, whose losses are one mean: over all of them and all processes."""
        samples, n_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        samples = self.complete(samples, device)
        labels = [known_labels(self.labels(sample)[:, 1:], self.vocab_size) for sample in samples]
        counted = [counted_labels(some, self.n_predict).sum(0) for some in labels]
        if counted:
            mean = torch.stack(counted).float().mean(0).to(device)
            self._divisor = self.accelerator.reduce(mean, reduction="mean")
        return samples, n_items

    def complete(self, samples: list[dict], device: torch.device) -> list[dict]:
        """The micro-batches of a step, with all that `batch` needs."""
        return samples

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = self.batch(inputs).within(self.vocab_size)
        objective = partial(
            self.objective,
            next_states=batch.next_states,
            base_logits=partial(output_logits, self.base_model, vocab_size=self.vocab_size),
            training=model.training,
            divisor=self._divisor if model.training else None,
        )
        context = {"features": batch.features, "segments": batch.segments}
        outputs = model(*batch[:3], objective=objective, base_model=self.base_model, **context)
        if model.training:
            self.heads.add(outputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._read_window() | self.watch.rates(self.accelerator.num_processes)
        super().log(logs, start_time)

    def _read_window(self) -> dict[str, float]:
        means = self.heads.read(partial(self.accelerator.reduce, reduction="sum"))  # the same in every process
        if not all(map(math.isfinite, means.values())):
            self._stop()
        return means

    def _stop(self) -> None:
        raise ValueError(
            f"The loss is not finite at step {self.state.global_step}. Nothing was saved since the last complete "
            f"checkpoint, {self.run.latest_checkpoint()}. Lower `learning_rate`, or check the data and the "
            "base model's dtype: float16 overflows where bfloat16 does not."
        )

    def _begin(self, resume_from_checkpoint: str | bool | None) -> str | None:
        self.checkpoint = super()._begin(resume_from_checkpoint)
        self.before = read_provenance(self.checkpoint)
        self.seconds = (self.before or {}).get("seconds", 0.0)
        self.started = time.perf_counter()
        return self.checkpoint

    def _kept(self) -> str:
        if self.args.overwrite_output_dir and self.run.latest_checkpoint() is not None:
            return f"{super()._kept()} Leave out `--overwrite_output_dir`, which would delete it."
        return super()._kept()

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        self.seconds, self.started = self._seconds(), None
        self._read_window()  # of the steps since the last log
        return result

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None and self.args.parabolic_schedule:
            self.lr_scheduler = parabolic_cosine_schedule(
                optimizer or self.optimizer, self.args.get_warmup_steps(num_training_steps), num_training_steps
            )
            own_lr_scheduler(self)
        return super().create_scheduler(num_training_steps, optimizer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the speculator, and beside it where it comes from."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            best, steps = self.state.best_global_step, self.state.global_step
            is_best = (  # loaded when the training ended
                output_dir in (None, self.args.output_dir) and self.args.load_best_model_at_end and best
            )
            progress = {"steps": best if is_best else steps, "steps_trained": steps, "seconds": self._seconds()}
            progress["losses"] = [[log["step"], log["loss"]] for log in self.state.log_history if "loss" in log]
            folder = output_dir or self.args.output_dir
            had_ended = self.checkpoint is not None and steps == steps_in(self.checkpoint)
            known = [read_provenance(place) for place in (folder, self.checkpoint) if had_ended]
            known = [facts for facts in known if is_about(facts, weights_in(folder))]  # it stays as it was
            write_provenance(folder, known[0] if known else with_segments(self.facts | progress, self.before))

    def _seconds(self) -> float:
        return round(self.seconds + (time.perf_counter() - self.started if self.started is not None else 0.0), 1)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Saves tied weights once: those that were gathered have lost that they are one."""
        if state_dict is not None and not isinstance(self.model, PeftModel):
            tied = self.model.all_tied_weights_keys
            state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model, trial) -> None:
        """Keeps nothing of a run that has gone wrong."""
        broken = not (self.heads.is_finite() and are_finite(self.model))
        if self.accelerator.reduce(torch.tensor(float(broken), device=self.args.device), reduction="sum") > 0:
            self._stop()
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
        inputs = prepare_inputs(self, inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        of_rows = (outputs.row_losses, outputs.correct, outputs.correct_top_k)
        return loss, tuple(values.contiguous() for values in of_rows), outputs.counted.contiguous()


def check_layers_of_the_base_model(model: PreTrainedModel, base_model: PreTrainedModel) -> Cell:
    """A speculator's heads.

    Raises:
        ValueError: where they use layers of the base model which are in parts, another's, or not there.
    """
    cell = (model.get_base_model() if isinstance(model, PeftModel) else model).speculator
    if cell.needs_base_model and is_sharded(base_model):
        raise ValueError(
            "This speculator uses the base model's embeddings and LM head, which must be whole on each device: set "
            "`shard_base_model: false`."
        )
    cell.check_base_model(base_model)
    cell.check_training(base_model)
    return cell


def _check_data(train_dataset, eval_dataset) -> None:
    evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    for name, data in [("train_dataset", train_dataset), *(("eval_dataset", data) for data in evaluated)]:
        if isinstance(data, Sized) and len(data) == 0:
            raise ValueError(f"`{name}` has no rows. Give it some, or None.")
        if name == "eval_dataset" and not isinstance(data, Sized | None):
            raise ValueError("`eval_dataset` is a stream, of which nobody knows the end. Take some rows of it.")
