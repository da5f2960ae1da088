"""Stage 2: the speculator learns to predict what the base model itself generates."""

from itertools import islice

import datasets
import torch

from ..context_vectors import Reading
from .alignment import TrainingBatch, align
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
        prompts = {name: torch.cat([sample[name] for sample in samples]).to(device) for name in samples[0]}
        seed = self.generation_seed + 2**32 * (self.state.global_step + 1)  # evaluation's is that of no step
        at_once = self.args.generation_batch_size or self.args.per_device_train_batch_size
        parts = zip(*(part.split(at_once) for part in prompts.values()), strict=True)
        written = [self._write(dict(zip(prompts, part, strict=True)), seed) for part in parts]
        sizes = [len(sample["input_ids"]) for sample in samples]
        written = {name: torch.cat([part[name] for part in written]).split(sizes) for name in written[0]}
        return [dict(zip(written, part, strict=True)) for part in zip(*written.values(), strict=True)]

    def batch(self, inputs: dict[str, torch.Tensor]) -> TrainingBatch:
        """The generated tokens only: the first context vector is that of the prompt's last position."""
        if "states" not in inputs and "continuation" not in inputs:
            inputs = self._write(inputs, self.generation_seed)
        written = Continuations(**inputs) if "states" in inputs else self._read(inputs)
        return align(Reading(written.states, written.features), *written[1:3], self.n_predict, written.segments)

    def labels(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return inputs["labels"] if "labels" in inputs else self.sampler.labels(inputs["continuation"])

    def _write(self, prompts: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
        """Continuations of prompts: for a context layer, which reads the prompts as well, the texts alone."""
        input_ids, mask = prompts["input_ids"], prompts.get("attention_mask")
        with self.watch.measure("generation", len(input_ids) * self.sampler.generation_length):
            if self.feature_layers is None:
                written = self.sampler(input_ids, seed, mask)._asdict()
                return {name: part for name, part in written.items() if part is not None}
            return prompts | {"continuation": self.sampler.write(input_ids, seed, mask)[:, input_ids.shape[1] :]}

    def _read(self, inputs: dict[str, torch.Tensor]) -> Continuations:
        text = torch.cat([inputs["input_ids"], inputs["continuation"]], dim=1)
        with self.watch.measure("base_model", text.numel()):
            return self.sampler.read(text, inputs.get("attention_mask"), self.feature_layers)

    def write_continuations(self, folder: str) -> None:
        """Writes the continuations of a whole training to a folder, unless they are there, and trains on those."""
        args, prompts = self.args, self.train_dataset
        rows = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size
        # Where epochs are counted, what was written is read again in each.
        n_rows = rows * self.accelerator.num_processes if rows > 0 else len(prompts)
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
