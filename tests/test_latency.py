"""Ways to decode side by side: all of them lossless, counted rightly, and what can't run says why."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import commands
import pytest
import torch
from drafters import Oracle
from figures import check_figure, names, ticks
from tiny_models import VOCAB, character_tokenizer, tiny_model
from transformers import CompileConfig

from modeling_speculator import MedusaConfig, MedusaModel, MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.measuring import latency_report, plots
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
ALL += ["lookup", "static:lookup", "speculator+lookup"]


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


def test_a_compiled_method_is_lossless(llama, drafters, monkeypatch):
    traced = CompileConfig(backend="eager", mode=None)  # machine code takes a minute; test_static.py has it
    monkeypatch.setattr("modeling_speculator.measuring.methods.compile_on_any_device", lambda: traced)
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
    for name in ("medussa", "eager:generate", "generate+lookup", "speculator+medusa", "prompt_lookup+lookup"):
        with pytest.raises(ValueError, match="There is no method.*generate, prompt_lookup, .*medusa, unconditioned"):
            expand_methods(["generate", name], llama, drafters)


def test_runs_are_timed_in_turn():
    calls = []
    seconds = seconds_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "ababab"
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}


CPU = {"processor": "a CPU", "threads": 2}
TITLE = plots.title("Speed-up over plain generate", {"base model": "org/base", "speculator": "org/draft"}, CPU)


def timed(method, speedup, n_candidates=None, batch_size=1, prompt_length=64, date="2026-01-02"):
    """A row as `measure_latency` and the command make it."""
    dials = {} if n_candidates is None else {"n_candidates": n_candidates, "top_k_tokens_per_head": [5, 3, 2]}
    times = {"tokens_per_second": 100 * speedup, "tokens_per_second_range": [90.0, 300.0], "tokens_per_step": 2.5}
    times |= {"first_token_ms": 8.0, "ms_per_token": 4.0, "looping": 1, "identical_outputs": 4, "outputs": 4}
    load = {"batch_size": batch_size, "prompt_length": prompt_length, "new_tokens": 32, "speedup": speedup}
    return {"method": method} | dials | times | load | {"machine": CPU | {"date": date}}


def test_the_report():
    rows = [timed("generate", 1.0), timed("speculator", 1.5, 5, date="2026-01-04")]
    rows.append({"method": "mtp", "skipped": "no | layers", "batch_size": 1, "prompt_length": 64, "new_tokens": 32})
    about = {"models": {"base model": "org/base"}, "dtype": "torch.float32", "versions": {"torch": "2.13"}}
    page = latency_report.page(rows, 3, **about, machine=CPU | {"date": "2026-02-01"})
    head, _, rest = page.partition("\n\n| method |")
    assert head.startswith("# Speed-up over plain generate\n")
    assert "| date | 2026-01-02 to 2026-01-04 |" in head
    assert "| measured | 4 prompts at each load, 32 new tokens each; rounds in turn: 3 |" in head
    table, _, columns = rest.partition("\n\n")
    assert (
        "| speculator | 5 | [5, 3, 2] | 1 | 64 | 1.50 | 150.0 | 90.0 to 300.0 | 2.50 | 8.00 | 4.00 | 4 of 4 | 1 of 4 |"
        in table
    )
    assert "| mtp |  |  | 1 | 64 | no \\| layers |" in table
    explained = [line.split("**")[1] for line in columns.splitlines()]
    assert f"method | {' | '.join(explained[1:])} |".endswith(table.splitlines()[0].strip("| ") + " |")
    assert "GiB" not in page  # of a GPU
    assert "not the ratio of two speeds of this table" in columns
    assert latency_report.short_table(rows) in page


@pytest.mark.parametrize("varied", ["n_candidates", "batch_size", "prompt_length"])
def test_a_plot_over_what_varies(varied):
    values = [0, 1, 5] if varied == "n_candidates" else [1, 2, 4]
    rows = [timed("generate", 1.0), timed("prompt_lookup", 1.7)]
    rows += [timed("speculator", 1 + value / 10, **{"n_candidates": 5, varied: value}) for value in values]
    (axes,) = check_figure(figure := latency_report.figure(rows, TITLE), "org/base", "org/draft", "a CPU")
    assert axes.get_xlabel() == latency_report.AXES[varied] and axes.get_ylabel() == "speed-up over generate"
    assert ticks(axes) == (values if varied != "prompt_length" else [1, 2, 4, 64])
    assert names(figure) == ["prompt_lookup", "speculator", "plain generate"]
    lookup, speculator, _ = axes.lines
    assert speculator.get_xydata().tolist() == [[value, 1 + value / 10] for value in values]
    assert set(lookup.get_ydata()) == {1.7}
    held = {"batch_size": "batch size 1", "prompt_length": "prompts of 64 tokens"}
    assert varied == "prompt_length" or axes.get_title() == ", ".join(
        text for key, text in held.items() if key != varied
    )


def test_over_loads_a_method_has_its_fastest_candidates():
    """Above 0, where there are any; and a first load that failed is none."""
    rows = [{"method": "speculator", "error": "no", "batch_size": 1, "prompt_length": 9}]
    for batch_size in (2, 8):
        rows += [timed("speculator", speedup, k, batch_size) for k, speedup in ((0, 3.0), (2, 1.5), (5, 1.2))]
        rows.append(timed("medusa", 1.1, 0, batch_size))
    over_candidates, over_batches = check_figure(latency_report.figure(rows, TITLE))
    assert over_batches.get_title() == "prompts of 64 tokens, the fastest candidates"
    assert [line.get_ydata().tolist() for line in over_batches.lines[:2]] == [[1.5, 1.5], [1.1, 1.1]]
    assert over_candidates.lines[0].get_ydata().tolist() == [3.0, 1.5, 1.2]


def test_where_nothing_varies_there_are_bars_of_methods():
    rows = [timed("generate", 1.0), timed("speculator", 1.5, 5), timed("medusa", 1.25, 3), timed("early_exit", 0.5)]
    (axes,) = check_figure(latency_report.figure(rows, TITLE), "org/base", "a CPU")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["speculator", "medusa", "early_exit"]
    assert [bar.get_width() for bar in axes.patches] == [1.5, 1.25, 0.5]
    assert axes.get_title() == "batch size 1, prompts of 64 tokens"


@pytest.mark.parametrize("rows", [[], [timed("generate", 1.0)], [timed("generate", 1.0), timed("speculator", 1.5, 5)]])
def test_there_is_no_plot_of_a_point(rows):
    assert latency_report.figure(rows, TITLE) is None


def test_a_plot_of_many_methods_with_long_names():
    methods = [f"{'static:' * (n % 2)}a_drafter_with_a_long_name_{n}" for n in range(8)]
    loads = [(batch_size, length) for batch_size in (1, 2, 4, 8, 16, 32, 64) for length in (16, 64, 256, 1024, 4096)]
    rows = [timed(name, 1.5, k, *load) for name in methods for load in loads for k in (0, 1, 2, 5, 8, 16, 32)]
    figure = latency_report.figure(rows, TITLE)
    assert [ticks(axes) for axes in check_figure(figure)] == [
        [0, 2, 5, 8, 16, 32],
        [1, 2, 4, 8, 16, 32, 64],
        [16, 64, 256, 1024, 4096],
    ]
    assert names(figure) == [*methods, "plain generate"]


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
        return commands.run(RECIPE, *models, *sizes, "--output", tmp_path / "out", *flags)

    done = run("--prompt_length", 4, 20)
    assert done.returncode == 0, done.stderr
    assert "timing: " in done.stderr and "Load 4 of 4: batches of 2, prompts of 20 tokens" in done.stdout
    assert f"Written: {tmp_path}/out/latency.json" in done.stdout and "recipes/tune.py" in done.stdout
    page = (tmp_path / "out/latency.md").read_text()
    assert "Only 0 of 3 prompts have 20 tokens" in page
    assert f"| speculator | {tmp_path / 'speculator'} |" in page and f"| medusa | {tmp_path / 'medusa'} |" in page
    assert "| measured | 2 prompts at each load, 6 new tokens each; rounds in turn: 1 |" in page
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
