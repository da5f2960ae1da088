"""The metric of `evaluate`: hand-made records, and those of `generate`."""

import evaluate
import pytest
from drafters import oracle_for
from tiny_models import prompts

from modeling_speculator.measuring import acceptance_metric
from modeling_speculator.measuring.acceptance_metric import Acceptance


@pytest.fixture
def metric(tmp_path):
    return Acceptance(cache_dir=str(tmp_path))


def test_by_hand(metric):
    metric.add_batch(emitted_per_step=[[3, 1], [4]])
    metric.add(emitted_per_step=[2, 2, 1])
    found = metric.compute(n_predict=3)
    assert (found["steps"], found["tokens"], found["tokens_per_step"]) == (6, 13, 13 / 6)
    assert found["accepted_per_position"] == [4 / 6, 2 / 6, 1 / 6]
    low, high = found["tokens_per_step_interval"]
    assert 5 / 3 <= low < 13 / 6 < high <= 4
    assert metric.compute(emitted_per_step=[[2, 3]])["accepted_per_position"] == [1.0, 0.5]
    assert metric.compute(emitted_per_step=[[]])["tokens_per_step"] is None


def test_what_a_step_cannot_emit(metric):
    with pytest.raises(ValueError, match=r"between 1 and n_predict \+ 1 = 3 tokens"):
        metric.compute(emitted_per_step=[[1, 4]], n_predict=2)
    with pytest.raises(ValueError, match="between 1 and"):
        metric.compute(emitted_per_step=[[1, 0]])


def test_the_records_of_generate_by_a_metric_that_is_loaded(llama, tmp_path):
    inputs = prompts()
    options = {"max_new_tokens": 40, "do_sample": False}
    oracle = oracle_for(llama, inputs, llama.generate(**inputs, max_new_tokens=44, do_sample=False))
    out = llama.generate(**inputs, assistant_model=oracle, return_dict_in_generate=True, **options)
    metric = evaluate.load(acceptance_metric.__file__, cache_dir=str(tmp_path))
    metric.add_batch(emitted_per_step=[row.emitted_per_step for row in out.speculation.per_sequence])
    found = metric.compute(n_predict=3)
    assert found["tokens_per_step"] == out.speculation.tokens_per_step
    assert found["accepted_per_position"] == out.speculation.accepted_per_position
