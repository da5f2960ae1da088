"""Acceptance as a metric of the `evaluate` library, from the records of `generate`; it needs no network.

metric = Acceptance()                    # or evaluate.load("path/to/acceptance_metric.py")
for batch in batches:
    out = model.generate(**batch, assistant_model=speculator, return_dict_in_generate=True)
    metric.add_batch(emitted_per_step=[row.emitted_per_step for row in out.speculation.per_sequence])
metric.compute(n_predict=speculator.config.n_predict)
"""

import datasets
import evaluate

from modeling_speculator.measuring.acceptance import (
    bootstrap_interval,  # absolute: `evaluate.load` copies this file elsewhere
)
from modeling_speculator.statistics import SpeculationStatistics


_DESCRIPTION = "Tokens that a verifying forward of the base model emits, and how far into a draft they reach."
_INPUTS = """
Args:
    emitted_per_step: of each sequence, the tokens that each of its verifying forwards emitted
        (`out.speculation.per_sequence[row].emitted_per_step`).
    n_predict: tokens that a draft can hold; default: one less than the most that a step emitted.
    confidence: of the interval over sequences.
Returns:
    tokens_per_step: None where no step was made.
    tokens_per_step_interval: by bootstrap over sequences.
    accepted_per_position: shares of steps in which at least i + 1 drafted tokens were emitted.
    steps, tokens.
"""
_CITATION = """
@misc{wertheimer2024accelerating,
  title={Accelerating Production LLMs with Combined Token/Embedding Speculators},
  author={Davis Wertheimer and others}, year={2024}, eprint={2404.19124}, archivePrefix={arXiv}
}
"""


class Acceptance(evaluate.Metric):
    """Tokens per step over any number of sequences."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"emitted_per_step": datasets.List(datasets.Value("int32"))}),
        )

    def _compute(self, emitted_per_step, n_predict: int | None = None, confidence: float = 0.95) -> dict:
        rows = [[int(emitted) for emitted in row] for row in emitted_per_step]
        longest = max((emitted for row in rows for emitted in row), default=1)
        most = longest if n_predict is None else n_predict + 1
        wrong = next((row for row in rows if any(not 1 <= emitted <= most for emitted in row)), None)
        if wrong is not None:
            raise ValueError(f"A step emits between 1 and n_predict + 1 = {most} tokens, but one record is {wrong}.")
        n_predict = longest - 1 if n_predict is None else n_predict
        record = SpeculationStatistics(tuple(emitted for row in rows for emitted in row), (), 0, n_predict)
        records = [{"prompt": number, "emitted_per_step": row} for number, row in enumerate(rows)]
        return {
            "tokens_per_step": record.tokens_per_step,
            "tokens_per_step_interval": bootstrap_interval(records, confidence),
            "accepted_per_position": record.accepted_per_position,
            "steps": record.steps,
            "tokens": record.tokens,
        }
