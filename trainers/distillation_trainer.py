"""Stage 2: the speculator learns to predict what the base model itself generates."""

from itertools import islice

import datasets
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
            `write_continuations`) nothing is generated.
    """

    def complete(self, samples: list[dict], device: torch.device) -> list[dict]:
        """The continuations of all micro-batches of a step are written together, `generation_batch_size` at once."""
        if not samples or "continuation" in samples[0]:
            return samples
        prompts = torch.cat([sample["input_ids"] for sample in samples]).to(device)
        seed = self.generation_seed + 2**32 * (self.state.global_step + 1)  # evaluation's is that of no step
        at_once = self.args.generation_batch_size or self.args.per_device_train_batch_size
        written = [self._write(some, seed) for some in prompts.split(at_once)]
        sizes = [len(sample["input_ids"]) for sample in samples]
        parts = zip(*(torch.cat(part).split(sizes) for part in zip(*written, strict=True)), strict=True)
        return [Continuations(*part)._asdict() for part in parts]

    def batch(self, inputs: dict[str, torch.Tensor]) -> TrainingBatch:
        """The generated tokens only: the first context vector is that of the prompt's last position."""
        if "states" in inputs:
            written = Continuations(**inputs)
        elif "continuation" in inputs:
            written = self._read(inputs)
        else:
            written = self._write(inputs["input_ids"], self.generation_seed)
        return align(*written, self.n_predict)

    def labels(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return inputs["labels"] if "labels" in inputs else self.sampler.labels(inputs["continuation"])

    def _write(self, prompts: torch.Tensor, seed: int) -> Continuations:
        with self.watch.measure("generation", len(prompts) * self.sampler.generation_length):
            return self.sampler(prompts, seed)

    def _read(self, inputs: dict[str, torch.Tensor]) -> Continuations:
        prompts, tokens = inputs["input_ids"], inputs["continuation"]
        text = torch.cat([prompts, tokens], dim=1)
        with self.watch.measure("base_model", text.numel()):
            states = read(self.base_model, text[:, :-1])[:, prompts.shape[1] - 1 :]
        return Continuations(states, tokens, self.labels(inputs))

    def write_continuations(self, folder: str) -> None:
        """Writes the continuations of a whole training to a folder, unless they are there, and trains on those."""
        args, prompts = self.args, self.train_dataset
        rows = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size
        n_rows = rows * self.accelerator.num_processes if rows > 0 else round(len(prompts) * args.num_train_epochs)
        if isinstance(prompts, datasets.IterableDataset):
            prompts = datasets.Dataset.from_list(list(islice(prompts, n_rows)))
        self.train_dataset = write_continuations(
            prompts,
            self.sampler,
            self.accelerator,
            folder,
            n_rows,
            batch_size=args.generation_batch_size or args.per_device_train_batch_size,
            seed=self.generation_seed,
            described={
                "base_model": self.facts["base_model"],
                "base_model_weights": self.facts["base_model_weights"],
                "prompt_length": self.prompt_length,
                "generation_length": self.sampler.generation_length,
                "temperature": args.generation_temperature,
                "top_k": args.generation_top_k,
            },
        )
