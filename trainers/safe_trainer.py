"""A `Trainer` whose runs are never mixed, and can be killed at any moment."""

import math
import shutil
from pathlib import Path

from peft import PeftModel
from transformers import PrinterCallback, Trainer
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..model_cards.provenance_file import weights_in
from ..transformers_api import check_contract, run_dir
from .checkpoints import MARKER, can_resume, checkpoints, mark_complete, rotate
from .launch import in_main_process
from .log_lines import LogLines
from .run_folder import check_room
from .run_lock import hold
from .run_record import RunRecord, open_run
from .run_settings import lies_in, training_settings


class SafeTrainer(Trainer):
    """A `Trainer` that marks its checkpoints once they are whole, and goes on from the newest of those.

    While it trains, no other launch trains into its `output_dir`.

    Args:
        run: of `open_run`, which has compared all that decides what comes out. Without it only the arguments are
            compared, where a training goes on; one that does not go on begins a new run, whatever lies there.
    """

    def __init__(self, *args, run: RunRecord | None = None, **kwargs):
        check_contract("train")
        self.run = run
        super().__init__(*args, **kwargs)
        for theirs in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(theirs)
        self.add_callback(LogLines())

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As `Trainer`.

        Raises:
            ValueError: if another launch trains into the folder, its disk has no room, or the training there was made
                with other settings.
        """
        with hold(self.args.output_dir):
            checkpoint = self._begin(resume_from_checkpoint)
            in_main_process(lambda: check_room(Path(self.args.output_dir), self._bytes_to_write()))
            try:
                return super().train(checkpoint, *args, **kwargs)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(self._kept()) from None

    def _begin(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Opens the run, a new one unless it goes on; the checkpoint that it goes on from."""
        asked, output_dir = resume_from_checkpoint, self.args.output_dir
        is_here = asked is True or (bool(asked) and lies_in(asked, output_dir))
        settings = training_settings(self.args)
        if is_here and self.run is None:
            self.run = open_run(output_dir, settings)
        checkpoint = self.run.latest_checkpoint() if asked is True else asked or None
        if is_here and checkpoint is not None and not can_resume(Path(checkpoint), self.run.identity):
            raise ValueError(
                f"`resume_from_checkpoint={asked}` is no complete checkpoint of the training in {output_dir}, whose "
                f"newest is {self.run.latest_checkpoint()}."
            )
        if checkpoint is None or self.run is None:
            new = self.run.anew() if self.run is not None else RunRecord(Path(output_dir), settings.values)
            self.run = in_main_process(lambda: new)
        return checkpoint

    def _kept(self) -> str:
        """What an interrupted training leaves behind, in words."""
        checkpoint = self.run.latest_checkpoint()
        if checkpoint is None:
            return "Nothing was saved yet."
        return f"{checkpoint} is kept: the same command goes on from there."

    def _bytes_to_write(self) -> int:
        """The least that will be added to the disk: checkpoints as far as they are known, and the model at the end."""
        args, weights = self.args, list(self.model.parameters())
        trained = sum(weight.nbytes for weight in weights if weight.requires_grad)
        model = trained if isinstance(self.model, PeftModel) else sum(weight.nbytes for weight in weights)
        moments = 2 if "adamw_torch" in args.optim and not args.save_only_model else 0  # other optimizers keep less
        planned = 0 if args.save_strategy == SaveStrategy.NO else 1
        if args.save_strategy == SaveStrategy.STEPS and args.max_steps > 0 and args.save_steps >= 1:
            planned = math.ceil(args.max_steps / args.save_steps)
        if args.save_total_limit:
            planned = min(planned, args.save_total_limit + 1)  # a new one is whole before an old one goes
        folder = Path(args.output_dir)
        at_the_end = 0 if weights_in(folder) else model
        return max(0, planned - len(checkpoints(folder))) * (model + moments * trained) + at_the_end

    def _run_epoch(self, *args, **kwargs):
        """None for a run that was finished already: `Trainer` looks at the number of steps only after a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`; whose model it is, is said first."""
        is_the_end = output_dir in (None, self.args.output_dir)
        if is_the_end and self.run is not None and self.args.should_save:
            self.run.write()
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial) -> None:
        """Lets go of older checkpoints only when this one is whole."""
        folder = Path(run_dir(self, trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            self.run.write()
            # It may be there, of a run that went on from before, or of another one: not a file of it is mixed in.
            (checkpoint / MARKER).unlink(missing_ok=True)
            shutil.rmtree(checkpoint, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(checkpoint, self.run.identity, can_resume=not self.args.save_only_model)
            if limit is not None and limit > 0:
                rotate(folder, limit, keep={str(checkpoint), str(self.state.best_model_checkpoint)})
        self.accelerator.wait_for_everyone()
