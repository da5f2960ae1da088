"""Ways to decode side by side: all of them lossless, counted rightly, and what can't run says why."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from drafters import Oracle
from tiny_models import VOCAB, character_tokenizer, tiny_model

from modeling_speculator import MedusaConfig, MedusaModel, MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.measuring.benchmarking import digest, seconds_in_turn
from modeling_speculator.measuring.latency import measure_latency
from modeling_speculator.measuring.methods import expand_methods
from modeling_speculator.modeling_unconditioned import UnconditionedConfig, UnconditionedSpeculator


RECIPE = Path(__file__).parents[1] / "recipes/benchmark_latency.py"
SHAPE = {"vocab_size": VOCAB, "emb_dim": 32}


@pytest.fixture(scope="module")
def drafters():
    torch.manual_seed(0)
    return {
        "speculator": MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(**SHAPE)).eval(),
        "medusa": MedusaModel(MedusaConfig(**SHAPE)).eval(),
        "unconditioned": UnconditionedSpeculator(UnconditionedConfig(**SHAPE)).eval(),
        "draft_model": tiny_model("llama"),
    }


def batches(rows=2, length=7, size=1):
    prompts = torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))
    return [(part, torch.ones_like(part)) for part in prompts.split(size)]


ALL = ["generate", "prompt_lookup", "draft_model", "early_exit", "mtp", "dflash", "speculator", "medusa"]
ALL += ["unconditioned", "static:generate", "static:speculator", "static:medusa"]


@pytest.mark.parametrize("size", [1, 2])
def test_every_method_is_lossless_or_says_why_not(llama, drafters, size):
    methods = expand_methods(ALL, llama, drafters, batch_size=size)
    rows = {row["method"]: row for row in measure_latency(llama, methods, batches(size=size), 12, rounds=2)}
    assert list(rows) == ALL
    skipped = {name: row["skipped"] for name, row in rows.items() if "skipped" in row}
    assert skipped.pop("dflash") == "no such drafter was given"
    assert "no layers" in skipped.pop("mtp")
    one_at_a_time = {"prompt_lookup", "draft_model", "early_exit"}
    assert skipped.keys() == (one_at_a_time if size == 2 else set())
    for name, row in rows.items():
        if "skipped" not in row:
            assert "error" not in row, row
            assert row["identical_outputs"] == row["outputs"] == 2, name
            assert row["tokens_per_second_range"][0] <= row["tokens_per_second"] <= row["tokens_per_second_range"][1]
            assert row["first_token_ms"] > 0 and row["speedup"] > 0
    assert rows["generate"]["tokens_per_step"] == rows["static:generate"]["tokens_per_step"] == 1
    assert rows["generate"]["speedup"] == 1
    assert len({(row["looping"], row["distinct_4grams"]) for row in rows.values() if "skipped" not in row}) == 1
    if size == 1:  # it is the base model, and always right
        assert rows["draft_model"]["tokens_per_step"] > 2


def test_texts_that_loop_are_counted(llama):
    """By a text of one token, and one without repetitions."""
    methods = expand_methods(["generate"], llama, {})
    for start, step, looping, distinct in ((5, 0, 2, 1 / 5), (0, 1, 0, 1.0)):
        rows = torch.arange(8).mul(step).add(start).expand(2, -1)
        llama.generate = lambda ids, rows=rows, **_: SimpleNamespace(sequences=torch.cat([ids, rows[: len(ids)]], -1))
        try:
            (row,) = measure_latency(llama, methods, batches(), 8, rounds=1)
        finally:
            del llama.generate
        assert (row["looping"], row["distinct_4grams"]) == (looping, distinct)


def test_a_compiled_method_is_lossless(llama, drafters):
    methods = expand_methods(["generate", "compiled:speculator"], llama, drafters)
    plain, compiled = measure_latency(llama, methods, batches(rows=1), 8, rounds=1)
    assert compiled["identical_outputs"] == plain["outputs"] == 1


def test_tokens_per_step_are_those_of_the_statistics(llama):
    """By an oracle, which is right in 7 of 10 cases, and an end of text that does not end anything."""
    (prompt, mask), *_ = batches(rows=1)
    llama.generation_config.eos_token_id = list(range(VOCAB))
    try:
        text = llama.generate(prompt, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=None)
        oracle = Oracle(llama, text, n_predict=3, p_right=1.0)
        oracle.config.top_k_tokens_per_head, oracle.config.n_tree_nodes = [5, 3, 2], None
        methods = expand_methods(["generate", "oracle"], llama, {"oracle": oracle}, n_candidates=[0, 5])
        plain, without, with_oracle = measure_latency(llama, methods, [(prompt, mask)], 33, rounds=1)
        assert llama.generation_config.eos_token_id == list(range(VOCAB))
    finally:
        llama.generation_config.eos_token_id = None
    assert plain["tokens_per_step"] == without["tokens_per_step"] == 1
    assert with_oracle["tokens_per_step"] == 4
    assert (without["n_candidates"], with_oracle["n_candidates"]) == (0, 5)


def test_dials(llama, drafters):
    """As many children of the root as it takes to have so many leaves; the drafter's own are left as they were."""
    for _ in range(2):
        methods = expand_methods(["speculator"], llama, drafters, n_candidates=[0, 5, 30, 31])
        assert [method.dials["top_k_tokens_per_head"] for method in methods] == [[5, 3, 2]] * 3 + [[6, 3, 2]]
        rows = measure_latency(llama, methods, batches(rows=1), 6, rounds=1)
        assert [row["n_candidates"] for row in rows] == [0, 5, 30, 31]
        assert all("error" not in row and "speedup" not in row for row in rows)
    (own,) = expand_methods(["speculator"], llama, drafters)
    assert (own.dials["n_candidates"], own.dials["top_k_tokens_per_head"]) == (5, [5, 3, 2])


def test_a_method_that_fails_later_is_a_row(llama, drafters, monkeypatch):
    generate, calls = llama.generate, []

    def fails_at_last(*args, **kwargs):
        calls.append(1)
        if len(calls) == 7:  # warmed up: 2 runs of each, then 2 timed ones of the first
            raise RuntimeError("out of memory")
        return generate(*args, **kwargs)

    monkeypatch.setattr(llama, "generate", fails_at_last)
    methods = expand_methods(["generate", "speculator"], llama, drafters)
    plain, failed = measure_latency(llama, methods, batches(rows=1)[:1], 6, rounds=1)
    assert plain["speedup"] == 1
    assert failed["error"] == "RuntimeError: out of memory"


def test_steps_of_transformers_own_are_those_that_it_streams(llama):
    """A draft model that is the base model is always right, and a step emits one token more than it has drafted."""
    draft_model = tiny_model("llama")
    draft_model.generation_config.num_assistant_tokens = 3
    draft_model.generation_config.num_assistant_tokens_schedule = "constant"
    draft_model.generation_config.assistant_confidence_threshold = 0.0
    (method,) = expand_methods(["tiny"], llama, {"tiny": draft_model})
    assert method.is_stock and method.reason is None
    (row,) = measure_latency(llama, [method], batches(rows=1), 16, rounds=1)
    assert "error" not in row, row
    assert row["tokens_per_step"] == 4
    assert row["first_token_ms"] > 0


def test_a_method_that_fails_is_a_row(llama, drafters):
    broken = MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=16)).eval()
    methods = expand_methods(["generate", "broken", "speculator"], llama, drafters | {"broken": broken})
    plain, failed, fine = measure_latency(llama, methods, batches(rows=1), 6, rounds=1)
    assert failed["error"].startswith("ValueError: The speculator has `emb_dim=16`")
    assert "speedup" not in failed
    assert fine["identical_outputs"] == plain["identical_outputs"] == 1


def test_a_speed_that_drifts_drifts_for_both(llama, drafters, monkeypatch):
    """By a clock that runs faster and faster: every method takes as long as plain `generate`, and comes out so."""
    names = ["generate", *(f"{name}" for name in drafters if name != "draft_model")]
    clock = iter(range(10**6))
    now = [0.0]

    def perf_counter():
        now[0] += 1 + next(clock) / 100  # of each reading, more than before
        return now[0]

    monkeypatch.setattr("modeling_speculator.measuring.latency.time.perf_counter", perf_counter)
    rows = measure_latency(llama, expand_methods(names, llama, drafters), batches(rows=1), 8, rounds=3)
    assert [row["speedup"] for row in rows] == pytest.approx([1.0] * 4, abs=0.01)
    rates = [row["tokens_per_second"] for row in rows]
    assert max(rates) > 1.05 * min(rates)  # as they would have been compared


def test_the_time_is_that_of_a_bare_loop(llama, drafters, monkeypatch):
    """By a clock that every forward of base model and drafter moves on: the harness adds none."""
    forwards = [0]

    def count(*_):
        forwards[0] += 1

    model, speculator = copy.deepcopy(llama), copy.deepcopy(drafters["speculator"])
    for module in (model, *speculator.speculator.head):
        module.register_forward_pre_hook(count)
    monkeypatch.setattr("modeling_speculator.measuring.latency.time.perf_counter", lambda: float(forwards[0]))
    names = ["generate", "speculator", "static:generate", "static:speculator"]
    methods = expand_methods(names, model, {"speculator": speculator})
    measured = measure_latency(model, methods, batches(), 12, rounds=2)
    for method, row in zip(methods, measured, strict=True):
        options = method.options | {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
        forwards[0] = 0
        for ids, mask in batches():
            model.generate(ids, attention_mask=mask, max_new_tokens=12, **options)
        assert 2 * 12 / row["tokens_per_second"] == pytest.approx(forwards[0]), method.name


def test_unknown_methods(llama, drafters):
    for name in ("medussa", "eager:generate"):
        with pytest.raises(ValueError, match="There is no method.*generate, prompt_lookup, .*medusa, unconditioned"):
            expand_methods(["generate", name], llama, drafters)


def test_runs_are_timed_in_turn():
    calls = []
    seconds = seconds_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "ababab"
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}


def test_the_command(tmp_path, drafters):
    tiny_model("llama").save_pretrained(tmp_path / "base_model")
    character_tokenizer(eos_token="z").save_pretrained(tmp_path / "base_model")
    drafters["speculator"].save_pretrained(tmp_path / "speculator")
    drafters["medusa"].save_pretrained(tmp_path / "medusa")
    (tmp_path / "prompts.txt").write_text("abcdefghijklmnop\nb\nqrstuvwxyabcdefg\n")

    def run(*flags):
        models = ["--base_model", tmp_path / "base_model", "--speculator", tmp_path / "speculator"]
        models += ["--drafters", f"medusa={tmp_path / 'medusa'}", "--prompts", tmp_path / "prompts.txt"]
        sizes = ["--max_new_tokens", 6, "--rounds", 1, "--n_prompts", 2, "--batch_size", 1, 2]
        command = [sys.executable, RECIPE, *models, *sizes, "--output", tmp_path / "out", *flags]
        return subprocess.run([str(part) for part in command], capture_output=True, text=True)

    done = run("--prompt_length", 4, 20)
    assert done.returncode == 0, done.stderr
    assert "timing: " in done.stderr and "Load 4 of 4: batches of 2, prompts of 20 tokens" in done.stdout
    assert f"Written: {tmp_path}/out/latency.json" in done.stdout and "recipes/tune.py" in done.stdout
    assert "Only 0 of 3 prompts have 20 tokens" in (tmp_path / "out/latency.md").read_text()
    measured = (tmp_path / "out/latency.jsonl").read_text()
    done = run("--prompt_length", 4, 8)  # goes on after the cells of 4
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/latency.jsonl").read_text().startswith(measured)
    every = json.loads((tmp_path / "out/latency.json").read_text())
    failed = [row for row in every if row["prompt_length"] == 20]
    assert len(failed) == 8 and all("error" in row for row in failed)
    rows = [row for row in every if row["prompt_length"] != 20]
    expected = {"method", "batch_size", "prompt_length", "machine", "base_model"}
    assert all(expected <= row.keys() for row in rows)
    measured = [row for row in rows if row["method"] != "prompt_lookup"]
    more = {"tokens_per_second", "tokens_per_step", "speedup"}
    assert all(more <= row.keys() for row in measured)
    weights = {(row["method"], row.get("weights")) for row in rows if "weights" in row}
    assert weights == {(name, digest(drafters[name])) for name in ("speculator", "medusa")}
    cells = [(row["method"], row["batch_size"], row["prompt_length"]) for row in rows]
    names = ["generate", "prompt_lookup", "medusa", "speculator"]
    assert sorted(cells) == sorted((name, size, length) for name in names for size in (1, 2) for length in (4, 8))
    assert len(cells) == 16
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "latency.json", "latency.jsonl", "latency.md", "latency.png"
    }  # fmt: skip
