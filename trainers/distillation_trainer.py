"""Stage 2: the speculator learns to predict what the base model itself generates."""

import torch

from .alignment import TrainingBatch, align
from .base_model import read
from .continuations import Continuations
from .generated import write_continuations
from .speculator_trainer import SpeculatorTrainer


class DistillationTrainer(SpeculatorTrainer):
    """`SpeculatorTrainer` on continuations that the base model samples, at temperature 1 with top-k 10, in the loop.

    Args:
        train_dataset, ...: prompts, a column `input_ids` of rows of equal length; with a column `continuation` (of
            `generated.write_continuations`) nothing is generated.
    """

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, their continuations written in one batch."""
        samples, n_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples and "continuation" not in samples[0]:
            prompts = [sample["input_ids"] for sample in samples]
            # Evaluation's seed is that of no step.
            seed = self.generation_seed + 2**32 * (self.state.global_step + 1)
            written = self._write(torch.cat(prompts).to(device), seed)
            sizes = [len(some) for some in prompts]
            parts = zip(*(part.split(sizes) for part in written), strict=True)
            samples = [Continuations(*part)._asdict() for part in parts]
        return samples, n_items

    def batch(self, inputs: dict[str, torch.Tensor]) -> TrainingBatch:
        """The generated tokens only: the first context vector is that of the prompt's last position."""
        if "states" in inputs:
            written = Continuations(**inputs)
        elif "continuation" in inputs:
            written = self._read(inputs["input_ids"], inputs["continuation"])
        else:
            written = self._write(inputs["input_ids"], self.generation_seed)
        return align(*written, self.n_predict)

    def _write(self, prompts: torch.Tensor, seed: int) -> Continuations:
        with self.watch.measure("generation", len(prompts) * self.sampler.generation_length):
            return self.sampler(prompts, seed)

    def _read(self, prompts: torch.Tensor, tokens: torch.Tensor) -> Continuations:
        text = torch.cat([prompts, tokens], dim=1)
        with self.watch.measure("base_model", text.numel()):
            states = read(self.base_model, text[:, :-1])[:, prompts.shape[1] - 1 :]
        return Continuations(states, tokens, self.sampler.labels(tokens))

    def write_continuations(self, folder: str) -> None:
        """Writes the continuations of a whole training to a folder, unless they are there, and trains on those."""
        sampler, steps = self.sampler, self.args.max_steps * self.args.gradient_accumulation_steps
        rows = steps * self.args.train_batch_size * self.accelerator.num_processes
        self.train_dataset = write_continuations(
            self.train_dataset,
            sampler,
            self.accelerator,
            folder,
            n_rows=rows if rows > 0 else round(len(self.train_dataset) * self.args.num_train_epochs),
            batch_size=self.args.train_batch_size * self.args.gradient_accumulation_steps,
            seed=self.generation_seed,
            described={
                "base_model": self.base_model.config.name_or_path,
                "prompt_length": self.prompt_length,
                "generation_length": sampler.generation_length,
                "temperature": self.args.generation_temperature,
                "top_k": self.args.generation_top_k,
            },
        )
