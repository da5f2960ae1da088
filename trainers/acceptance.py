"""Expected tokens per step of a speculator in training, on what the base model writes after held-out prompts."""

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..measuring.evaluation import accepted_drafts, simulate_steps
from .continuations import Continuations, ContinuationSampler
from .distribution import gathered


ROWS_TO_WRITE = 32  # prompts continued at once


class ExpectedAcceptance:
    """Measures by each of some samplers; what they write is written once, for the base model never changes.

    Args:
        samplers: {name of the metric: how its texts are written}.
        n_prompts: at most, over all processes; spread evenly over the rows of a dataset.
        prompt_length: tokens of a row that are its prompt.
        feature_layers: for a context layer, see `ContinuationSampler`.
        shows_bar: while the texts are written.
    """

    def __init__(
        self,
        samplers: dict[str, ContinuationSampler],
        accelerator: Accelerator,
        n_prompts: int,
        prompt_length: int,
        seed: int,
        feature_layers: Sequence[int] | None = None,
        shows_bar: bool = True,
    ):
        self.samplers, self.accelerator, self.feature_layers = samplers, accelerator, feature_layers
        self.shows_bar = shows_bar and accelerator.is_main_process
        self.n_prompts, self.prompt_length, self.seed = n_prompts, prompt_length, seed
        self._prompts, self._n_own, self._texts = None, 0, {}

    @torch.no_grad()
    def measure(self, model, dataset) -> dict[str, float]:
        """Expected tokens per step with the configured candidates; all processes take part.

        Args:
            model: the speculator, as the trainer has it.
            dataset: rows of `input_ids`; with an `attention_mask`, of prompts after padding.
        """
        self._write(*self.prompts(dataset))
        speculator = self.accelerator.unwrap_model(model).beside(next(iter(self.samplers.values())).base_model)
        measured = {}
        with gathered(model), self.accelerator.autocast():
            for name, texts in self._texts.items():
                totals = torch.zeros(2, dtype=torch.long)
                for written, labels in self._read(name, texts):
                    accepted = accepted_drafts(speculator, written.starts(speculator), labels)
                    totals += torch.tensor(simulate_steps(accepted, (labels != -100).sum(-1)))
                steps, tokens = self.accelerator.reduce(totals.to(self.accelerator.device), reduction="sum").tolist()
                measured[name] = tokens / max(1, steps)
        return measured

    def prompts(self, dataset) -> tuple[torch.Tensor, int]:
        """This process's prompts and their mask, (2, prompts, prompt_length), as many as in every other, and how many
        of them no other process has, too."""
        rows = min(len(dataset), self.n_prompts)
        share = -(-rows // self.accelerator.num_processes)
        first = self.accelerator.process_index * share
        numbers = [at % rows * len(dataset) // rows for at in range(first, first + share)]
        rows_of = [dataset[number] for number in numbers]
        prompts = torch.tensor([row["input_ids"] for row in rows_of])
        if "attention_mask" in rows_of[0]:  # padding comes first
            mask = torch.tensor([row["attention_mask"] for row in rows_of])[:, -self.prompt_length :]
            prompts = prompts[:, -self.prompt_length :]
        else:
            prompts = prompts[:, : self.prompt_length]
            mask = torch.ones_like(prompts)
        return torch.stack([prompts, mask]), max(0, min(share, rows - first))

    def _write(self, prompts: torch.Tensor, n_own: int) -> None:
        if self._prompts is not None and torch.equal(prompts, self._prompts):
            return
        shown = {"desc": "texts to evaluate on", "unit": "batch", "leave": False, "disable": not self.shows_bar}
        for name, sampler in self.samplers.items():
            parts = tqdm(prompts.to(self.accelerator.device).split(ROWS_TO_WRITE, dim=1), **shown)
            if self.feature_layers is None:
                self._texts[name] = [sampler(some, self.seed, mask).to("cpu") for some, mask in parts]
            else:  # states and features of whole texts are large: they are read again at each evaluation
                self._texts[name] = [(sampler.write(some, self.seed, mask).cpu(), mask.cpu()) for some, mask in parts]
        self._prompts, self._n_own = prompts, n_own

    def _read(self, name: str, texts: list) -> Iterator[tuple[Continuations, torch.Tensor]]:
        """What one sampler has written, batch by batch, and its labels, but for rows that count in another process."""
        device = self.accelerator.device
        for number, written in enumerate(texts):
            if isinstance(written, Continuations):
                written = written.to(device)
            else:
                written = self.samplers[name].read(*(part.to(device) for part in written), self.feature_layers)
            labels = written.labels.clone()
            labels[max(0, self._n_own - number * ROWS_TO_WRITE) :] = -100
            yield written, labels
