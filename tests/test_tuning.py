"""Costs from made-up steps, yields against `generate`, and the command from end to end."""

import json
import random
from pathlib import Path

import commands
import pytest
import torch
from figures import check_figure, names, ticks
from tiny_models import VOCAB, character_tokenizer, tiny_model

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.configuration_mlp_speculator import DIALS
from modeling_speculator.measuring import plots, tuning_report
from modeling_speculator.measuring.tuning import StepCost, Texts, fit, grid, predict, work


RECIPE = Path(__file__).parents[1] / "recipes/tune.py"


@pytest.fixture(scope="module")
def texts():
    prompts = torch.randint(1, VOCAB, (6, 7), generator=torch.Generator().manual_seed(3))
    return Texts(tiny_model("llama"), prompts, new_tokens=30)


@pytest.fixture
def speculator(texts):
    """One that has learned some of the texts, a fifth of the tokens wrongly."""
    torch.manual_seed(0)
    speculator = MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=32, inner_dim=64))
    labels = torch.where(torch.rand(6, 29) < 0.2, torch.randint(VOCAB, (6, 29)), texts.tokens[:, 1:])
    optimizer = torch.optim.Adam(speculator.parameters(), 3e-3)
    for _ in range(60):
        loss = speculator(texts.drafting(speculator)[0][1][:, :-3], texts.tokens, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return speculator.eval()


def test_costs_are_found_again():
    """Of steps that cost what the model says, give or take a percent; what costs nothing comes out as nothing."""
    for cost in (StepCost(3.0, 0.1, 0.5, 0.02), StepCost(2.0, 0.0, 0.7, 0.0), StepCost(0.0, 1.0, 0.0, 0.1)):
        noise, rows = random.Random(0), []
        for nodes, heads, states in [(1, 0, 0), (4, 1, 1), (9, 2, 6), (16, 3, 21), (16, 3, 9), (32, 3, 30), (6, 3, 4)]:
            step_ms = cost.of(nodes, heads, states) * noise.uniform(0.99, 1.01)
            rows.append({"step_ms": step_ms, "nodes": nodes, "heads": heads, "states": states})
        found = fit(rows)
        for row in rows:
            assert found.of(row["nodes"], row["heads"], row["states"]) == pytest.approx(row["step_ms"], rel=0.02)
        assert min(vars(found).values()) >= 0


def test_the_grid(speculator):
    dials = grid(speculator.config)
    assert dials[0]["n_candidates"] == 0
    assert {row["n_heads"] for row in dials} == {None, 1, 2}
    assert len({json.dumps(row) for row in dials}) == len(dials)
    assert {dial: getattr(speculator.config, dial) for dial in DIALS} in dials
    speculator.config.n_candidates = 7  # which is no round number
    assert {dial: getattr(speculator.config, dial) for dial in DIALS} in grid(speculator.config)
    for row in dials:
        speculator.config.check_dials(*(row[dial] for dial in DIALS))


@pytest.mark.parametrize(
    ("dials", "expected"),
    [
        ({"n_candidates": 0}, (0, 0)),
        ({}, (3, 1 + 5 + 15)),
        ({"n_heads": 2}, (2, 1 + 5)),
        ({"n_tree_nodes": 8}, (3, 1 + 5 + 8)),
        ({"n_tree_nodes": 3, "n_heads": 2}, (2, 1 + 3)),
    ],
)
def test_work_of_a_draft(dials, expected):
    assert work(MLPSpeculatorConfig(**dials)) == expected


@pytest.mark.parametrize("dials", [{}, {"n_candidates": 2}, {"n_tree_nodes": 9}, {"n_heads": 2}, {"n_candidates": 0}])
def test_yields_are_generates(llama, texts, speculator, dials):
    """Steps of every text, and nodes, as `generate` takes them."""
    speculator.config.update(dials)
    steps, drafted = texts.steps(speculator), 0
    for prompt, expected in zip(texts.prompts, steps.tolist(), strict=True):
        out = llama.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            assistant_model=speculator,
            max_new_tokens=30,
            do_sample=False,
            return_dict_in_generate=True,
        )
        assert out.speculation.steps == expected
        drafted += out.speculation.drafted_tokens
    assert texts.nodes(speculator, 1) == pytest.approx(1 + drafted / int(steps.sum()), rel=0.1)
    assert texts.nodes(speculator, 6) >= texts.nodes(speculator, 1)


def test_predictions(texts, speculator):
    """By costs that are made up: all that counts is nodes, or nothing at all."""
    before = {dial: getattr(speculator.config, dial) for dial in DIALS}
    most, *others = predict(speculator, texts, 1, StepCost(1.0, 0.0, 0.0, 0.0), plain_ms=1.0)
    assert most["tokens_per_step"] == max(row["tokens_per_step"] for row in [most, *others])
    assert most["speedup"] == pytest.approx(most["tokens_per_step"])
    fewest, *_ = predict(speculator, texts, 1, StepCost(0.0, 1.0, 0.0, 0.0), plain_ms=1.0)
    assert fewest["n_candidates"] == 0
    assert fewest["speedup"] == pytest.approx(1) and fewest["tokens_per_step"] == 1
    # In a batch all wait for the slowest row.
    together, *_ = predict(speculator, texts, 6, StepCost(1.0, 0.0, 0.0, 0.0), plain_ms=1.0)
    assert 1 < together["speedup"] < most["speedup"]
    assert together["tokens_per_second"] > most["tokens_per_second"]
    assert {dial: getattr(speculator.config, dial) for dial in DIALS} == before


CPU = {"processor": "a CPU", "threads": 2, "date": "2026-01-02"}
TITLE = plots.title("Speed-up", {"base model": "org/base", "speculator": "org/draft"}, CPU)


def setting(n_candidates=5, n_tree_nodes=None, n_heads=None):
    top_k = {"top_k_tokens_per_head": [5, 3, 2]}
    return top_k | {"n_candidates": n_candidates, "n_tree_nodes": n_tree_nodes, "n_heads": n_heads}


def tuned(batch_size=1, sizes=(3, 8, 32), measured=((8, 1.5, 0.2), (None, 1.6, -0.1))):
    """A load's record; `measured` are the nodes of a tree, the speed-up with it and the error of its prediction."""
    verified = [
        setting(n_tree_nodes=nodes)
        | {"measured_speedup": speedup, "speedup_error": error, "measured_tokens_per_second": 100 * speedup}
        for nodes, speedup, error in measured
    ]
    fastest = max(verified, key=lambda row: row["measured_speedup"])
    recommended = fastest if fastest["measured_speedup"] > 1 else setting(n_candidates=0)
    predictions = [setting(n_tree_nodes=size) | {"speedup": 1 + size / 100} for size in sizes]
    predictions += [setting() | {"speedup": 3.0}, setting(n_tree_nodes=2, n_heads=1) | {"speedup": 3.0}]
    costs = {"per_step": 4.0, "per_node": 0.1, "per_head": 1.0, "per_state": 0.0}
    record = {"batch_size": batch_size, "context": 64, "plain_tokens_per_second": 100.0, "cost_ms": costs}
    return record | {"predictions": predictions, "verified": verified, "recommended": recommended}


def test_the_plot_compares_prediction_and_measurement_of_the_same_dials():
    figure = tuning_report.figure([tuned(), tuned(batch_size=4)], TITLE)
    predicted, pairs = check_figure(figure, "org/base", "org/draft", "a CPU")
    assert [line.get_xydata().tolist() for line in predicted.lines[:2]] == [[[3, 1.03], [8, 1.08], [32, 1.32]]] * 2
    assert ticks(predicted) == [3, 8, 32]
    joined = [line.get_xydata().tolist() for line in pairs.lines if len(line.get_xdata()) == 2][:4]
    expected = [[pytest.approx(1.8), 1.5], [pytest.approx(1.44), 1.6]]
    assert [[x for x, _ in pair] for pair in joined] == 2 * expected
    assert [[y for _, y in pair] for pair in joined] == [[height] * 2 for height in range(4)]
    assert [label.get_text() for label in pairs.get_yticklabels()][::3] == [
        "batch size 1, prompts of 64 tokens\nn_tree_nodes=8 of [5, 3, 2]",
        "batch size 4, prompts of 64 tokens\nn_candidates=5 of [5, 3, 2]",
    ]
    loads = [f"batch size {n}, prompts of 64 tokens" for n in (1, 4)]
    assert names(figure) == [*loads, "plain generate", "predicted", "measured"]


@pytest.mark.parametrize("sizes", [(), (3,)])
def test_there_is_no_curve_of_a_point(sizes):
    (pairs,) = check_figure(tuning_report.figure([tuned(sizes=sizes)], TITLE))
    assert pairs.get_xlabel() == "speed-up over generate"


def test_a_plot_of_many_loads():
    assert len(check_figure(tuning_report.figure([tuned(2**n) for n in range(12)], TITLE))) == 2


def test_the_report():
    settings = {"base_model": "org/base", "speculator": "runs/draft"}
    settings |= {"n_prompts": "16", "max_new_tokens": "64", "rounds": "3"}
    slow = tuned(batch_size=8, measured=[(8, 0.9, 0.2)])
    report = {"settings": settings, "loads": [tuned(), slow], "dtype": "torch.float32"}
    page = tuning_report.page(report | {"machine": CPU, "versions": {"torch": "2.13"}})
    head, table, columns, costs, _ = page.split("\n\n| b")[0], *page.split("\n\n")[2:]
    assert "| speculator | runs/draft |\n| date | 2026-01-02 |\n| machine | a CPU, 2 threads |" in head
    assert "| measured | 16 prompts at each load, in full batches, 64 new tokens each; rounds in turn: 3 |" in head
    assert table.splitlines()[2:] == [
        "| 1 | 64 | n_tree_nodes=8 of [5, 3, 2] | 1.80 | 1.50 | +20.0% | 150.0 |  |",
        "| 1 | 64 | n_candidates=5 of [5, 3, 2] | 1.44 | 1.60 | -10.0% | 160.0 | yes |",
        "| 1 | 64 | none: plain `generate` |  | 1.00 |  | 100.0 |  |",
        "| 8 | 64 | n_tree_nodes=8 of [5, 3, 2] | 1.08 | 0.90 | +20.0% | 90.0 |  |",
        "| 8 | 64 | none: plain `generate` |  | 1.00 |  | 100.0 | yes |",
    ]
    assert "is not the ratio of two speeds of this table" in " ".join(columns.split())
    assert "| 8 | 64 | 4.000 | 0.100 | 1.000 | 0.000 |" in costs


def test_the_command(tmp_path, speculator):
    tiny_model("llama").save_pretrained(tmp_path / "base_model")
    character_tokenizer(eos_token="z").save_pretrained(tmp_path / "base_model")
    speculator.save_pretrained(tmp_path / "speculator")
    (tmp_path / "prompts.txt").write_text("abcdefghijklmnop\nqrstuvwxyabcdefg\n")

    def run(*flags):
        models = ["--base_model", tmp_path / "base_model", "--speculator", tmp_path / "speculator"]
        sizes = ["--n_prompts", 2, "--prompt_length", 6, "--max_new_tokens", 8, "--rounds", 1]
        return commands.run(RECIPE, *models, "--prompts", tmp_path / "prompts.txt", *sizes, *flags)

    done = run("--batch_size", 1, "--output", tmp_path / "out", "--write")
    assert done.returncode == 0, done.stderr
    for name in ("texts", "costs of a step", "predictions", "the fastest, measured"):
        assert f"{name}: " in done.stderr
    assert "Load 1 of 1: batches of 1, prompts of 6 tokens" in done.stdout
    report = json.loads((tmp_path / "out/tuning.json").read_text())
    (load,) = report["loads"]
    assert {"cost_ms", "measured_steps", "recommended", "verified", "predictions"} <= load.keys()
    assert len(load["predictions"]) == len(grid(speculator.config))
    for row in load["verified"]:
        ratio = row["predicted_tokens_per_second"] / row["measured_tokens_per_second"]
        assert row["prediction_error"] == pytest.approx(ratio - 1)
        (predicted,) = (one for one in load["predictions"] if all(one[dial] == row[dial] for dial in DIALS))
        assert row["speedup_error"] == pytest.approx(predicted["speedup"] / row["measured_speedup"] - 1)
    written = MLPSpeculatorConfig.from_pretrained(tmp_path / "speculator")
    assert {dial: getattr(written, dial) for dial in DIALS} == load["recommended"]
    MLPSpeculatorPreTrainedModel.from_pretrained(tmp_path / "speculator")
    fastest = max(load["verified"], key=lambda row: row["measured_speedup"])
    if fastest["measured_speedup"] > 1:
        assert all(fastest[dial] == value for dial, value in load["recommended"].items())
    else:
        assert load["recommended"]["n_candidates"] == 0
    files = {"tuning.json", "tuning.jsonl", "tuning.md", "tuning.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    done = run("--batch_size", 1, 2, "--output", tmp_path / "two", "--write")
    assert "--write needs one --batch_size" in done.stderr
    speculator.save_pretrained(tmp_path / "speculator")
    done = run("--batch_size", 1, 2, "--output", tmp_path / "out")  # goes on after a batch of 1
    assert "was measured with" not in done.stderr and done.returncode == 0, done.stderr
    loads = json.loads((tmp_path / "out/tuning.json").read_text())["loads"]
    assert [load["batch_size"] for load in loads] == [1, 2]
    assert loads[0] == load
