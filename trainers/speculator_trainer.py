"""Stage 1: a speculator learns to predict text from the context vectors of a base model that reads it."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checks import check_positions, check_shapes
from .metrics import correct_per_head, head_metrics, per_head
from .schedules import parabolic_cosine_schedule
from .training_args import SpeculatorTrainingArguments


class TrainingBatch(NamedTuple):
    """What the speculator's forward takes: see `MLPSpeculatorPreTrainedModel.forward`."""

    hidden_states: torch.Tensor
    input_ids: torch.Tensor
    labels: torch.Tensor


class SpeculatorTrainer(Trainer):
    """Trains a speculator on sequences of `input_ids`, beside a frozen base model.

    Logs the loss and the accuracy of every head.

    Args:
        model: the speculator.
        base_model: a causal language model, put on the training device and never changed; it is not part of `model`.
        args, train_dataset, ...: as for `Trainer`; a dataset needs a column `input_ids` of rows of equal length.

    Raises:
        ValueError: if base model and speculator don't fit together, or the sequences are too short for the heads.
    """

    loss_is_scaled_for_ga = False  # a mean over the batch

    def __init__(
        self,
        model: PreTrainedModel,
        base_model: PreTrainedModel,
        args: SpeculatorTrainingArguments,
        **kwargs,
    ):
        check_shapes(base_model, model)
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs. Start it with `accelerate launch`, one process each."
            )
        kwargs.setdefault("compute_metrics", head_metrics)
        super().__init__(model=model, args=args, **kwargs)
        self.base_model = base_model.eval().to(args.device)
        self._steps_logged = 0
        self._window = None  # sums since the last log: losses, correct and counted predictions per head

    def batch(self, inputs: dict[str, torch.Tensor]) -> TrainingBatch:
        """Stage 1: all of the text, from its first token on."""
        return self.align(inputs["input_ids"])

    def align(self, tokens: torch.Tensor, first: int = 0, labels: torch.Tensor | None = None) -> TrainingBatch:
        """Runs the base model over `tokens` (batch, length) and aligns its context vectors with them.

        The vector at position t, which the base model drew token t + 1 from, is trained with the tokens t + 1, t + 2,
        ... as inputs of the heads, so that head i predicts token t + 2 + i (arXiv 2404.19124, section 3).

        Args:
            first: the first position t to train at.
            labels: (batch, length), `tokens` with -100 where nothing shall be predicted; `tokens` by default.
        """
        labels = tokens if labels is None else labels
        last = tokens.shape[1] - self.n_predict - 1  # every head has a target at the positions before
        if last <= first:
            raise ValueError(
                f"Sequences of {tokens.shape[1]} tokens, trained from position {first} on, are too short for "
                f"{self.n_predict} heads, which need {self.n_predict + 2} tokens. Raise the sequence length."
            )
        check_positions(self.base_model, tokens.shape[1])
        device_type = tokens.device.type
        with torch.no_grad(), torch.autocast(device_type, enabled=False):  # in the dtype that it was loaded in
            decoder = self.base_model.get_decoder()
            hidden_states = decoder(input_ids=tokens[:, :last], use_cache=False).last_hidden_state[:, first:]
        return TrainingBatch(hidden_states, tokens[:, first + 1 : -1], labels[:, first + 2 :])

    @property
    def n_predict(self) -> int:
        return self.accelerator.unwrap_model(self.model).config.n_predict

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = self.batch(inputs)
        outputs = model(**batch._asdict())
        with torch.no_grad():
            outputs["correct"], outputs["counted"] = correct_per_head(outputs.logits, batch.labels)
            if model.training:
                self._add_to_window(outputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _add_to_window(self, outputs) -> None:
        sums = torch.stack([outputs.losses.detach(), outputs.correct.sum(0), outputs.counted.sum(0)])
        self._window = sums if self._window is None else self._window + sums
        self._steps_logged += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._window is not None and "loss" in logs:
            losses, correct, counted = self._window.tolist()
            logs |= per_head("loss", [loss / self._steps_logged for loss in losses])
            logs |= per_head("accuracy", [c / max(n, 1) for c, n in zip(correct, counted, strict=True)])
            self._window, self._steps_logged = None, 0
        super().log(logs, start_time)

    def evaluation_loop(self, *args, **kwargs):
        """Draws the same random numbers in each evaluation, and uses up none of the training's."""
        devices = [] if self.args.device.type == "cpu" else [self.args.device]
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.args.seed)
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        losses = outputs.losses.expand_as(outputs.correct)
        return loss, (outputs.correct, losses.contiguous()), outputs.counted

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None and self.args.parabolic_schedule:
            self.lr_scheduler = parabolic_cosine_schedule(
                optimizer or self.optimizer, self.args.get_warmup_steps(num_training_steps), num_training_steps
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)


def latest_checkpoint(output_dir: str) -> str | None:
    """The newest complete checkpoint of a run, or None.

    `Trainer` writes a checkpoint in place and its state last, so one whose state can't be read was cut off.
    """
    steps = {}
    for checkpoint in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit():
            steps[int(step)] = checkpoint
    for _, checkpoint in sorted(steps.items(), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, json.JSONDecodeError):
            continue
        return str(checkpoint)
    return None
