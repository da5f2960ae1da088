"""Expected tokens per step of a speculator in training, on what the base model writes after held-out prompts."""

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
        shows_bar: while the texts are written.
    """

    def __init__(
        self,
        samplers: dict[str, ContinuationSampler],
        accelerator: Accelerator,
        n_prompts: int,
        prompt_length: int,
        seed: int,
        shows_bar: bool = True,
    ):
        self.samplers, self.accelerator = samplers, accelerator
        self.shows_bar = shows_bar and accelerator.is_main_process
        self.n_prompts, self.prompt_length, self.seed = n_prompts, prompt_length, seed
        self._prompts, self._texts = None, {}

    @torch.no_grad()
    def measure(self, model, dataset) -> dict[str, float]:
        """Expected tokens per step with the configured candidates; all processes take part.

        Args:
            model: the speculator, as the trainer has it.
            dataset: rows of `input_ids`.
        """
        self._write(*self.prompts(dataset))
        speculator = self.accelerator.unwrap_model(model).beside(next(iter(self.samplers.values())).base_model)
        measured = {}
        with gathered(model), self.accelerator.autocast():
            for name, texts in self._texts.items():
                totals = torch.zeros(2, dtype=torch.long)
                for written in texts:
                    written = Continuations(*(part.to(self.accelerator.device) for part in written))
                    accepted = accepted_drafts(speculator, written.states, written.labels)
                    totals += torch.tensor(simulate_steps(accepted, (written.labels != -100).sum(-1)))
                steps, tokens = self.accelerator.reduce(totals.to(self.accelerator.device), reduction="sum").tolist()
                measured[name] = tokens / max(1, steps)
        return measured

    def prompts(self, dataset) -> tuple[torch.Tensor, int]:
        """This process's prompts, as many as in every other, and how many of them no other process has, too."""
        rows = min(len(dataset), self.n_prompts)
        share = -(-rows // self.accelerator.num_processes)
        first = self.accelerator.process_index * share
        numbers = [at % rows * len(dataset) // rows for at in range(first, first + share)]
        prompts = torch.tensor([dataset[number]["input_ids"][: self.prompt_length] for number in numbers])
        return prompts, max(0, min(share, rows - first))

    def _write(self, prompts: torch.Tensor, n_own: int) -> None:
        if self._prompts is not None and torch.equal(prompts, self._prompts):
            return
        shown = {"desc": "texts to evaluate on", "unit": "batch", "leave": False, "disable": not self.shows_bar}
        for name, sampler in self.samplers.items():
            parts = tqdm(prompts.to(self.accelerator.device).split(ROWS_TO_WRITE), **shown)
            texts = [Continuations(*(part.cpu() for part in sampler(some, self.seed))) for some in parts]
            for row in range(n_own, len(prompts)):  # these count in another process
                texts[row // ROWS_TO_WRITE].labels[row % ROWS_TO_WRITE] = -100
            self._texts[name] = texts
        self._prompts = prompts
