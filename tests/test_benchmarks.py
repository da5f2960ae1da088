"""The benchmark scripts run and write what they say; how fast anything is, no test asserts."""

import json
import multiprocessing
import random
import runpy
import sys
from pathlib import Path

import commands
import pytest
import torch
import yaml
from figures import check_figure, names, ticks
from safetensors.torch import load_file
from test_head_to_head import load
from tiny_models import HIDDEN, VOCAB, tiny_model, word_tokenizer

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel


RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run_(script, *args):
        output = tmp_path / "results.json"
        monkeypatch.setattr(sys, "argv", [script, *map(str, args), "--output", str(output)])
        runpy.run_path(str(RECIPES / script), run_name="__main__")
        return json.loads(output.read_text())

    threads = torch.get_num_threads()
    yield run_
    torch.set_num_threads(threads)


def test_benchmark_step(run, tmp_path):
    base_model, speculator = tmp_path / "base_model", tmp_path / "speculator"
    tiny_model("llama").save_pretrained(base_model)
    word_tokenizer([f"w{n}" for n in range(VOCAB)]).save_pretrained(base_model)
    MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=HIDDEN)).save_pretrained(speculator)
    models = ["--base_model", base_model, "--speculator", speculator, "--prompt", "w3 w4"]
    report = run("benchmark_step.py", *models, "--max_new_tokens", 9, "--rounds", 1)
    names = ["generate", "prompt lookup", "n_candidates = 0", "n_candidates = 5", "n_tree_nodes = 15"]
    assert list(report["results"]) == names
    for name in names[2:]:
        row = report["results"][name]
        assert row["tokens_per_step"] >= 1
        assert row["step_ms"] == pytest.approx(row["overhead"] * (row["draft_ms"] + row["verify_ms"]))
        assert (row["draft_ms"] > 0) == (name != "n_candidates = 0")
    assert report["machine"]["date"] and report["versions"]["torch"]


def test_benchmark_gpu(run):
    """Its cells and its floor, on a CPU and a tiny model."""
    sizes = ["--batch_sizes", 1, 2, "--contexts", 8, "--rounds", 1, "--steps", 2]
    report = run("benchmark_gpu.py", "--device", "cpu", "--targets", "tiny", *sizes)
    assert [(row["batch_size"], row["context"]) for row in report["rows"]] == [(1, 8), (2, 8)]
    row = report["rows"][0]
    # 2 layers of 4 * 64 * 64 attention and 3 * 64 * 96 MLP weights, 5 norms, the LM head; 11 keys and values of each.
    n_bytes = 2 * (2 * (4 * 64 * 64 + 3 * 64 * 96) + 5 * 64 + 64 * 32000 + 2 * 2 * 64 * 11)
    assert row["loop_floor_ms"] == pytest.approx(n_bytes / (report["copy_gb_per_second"] * 1e6))
    # 3 heads: projection, LM head and norm; the embeddings are looked up.
    n_bytes += 2 * 3 * (64 * 64 + 64 * 32000 + 2 * 64)
    assert row["speculative_floor_ms"] == pytest.approx(n_bytes / (report["copy_gb_per_second"] * 1e6))
    assert report["kernels"]["tiny"]


def test_the_shapes_of_the_targets():
    """Parameters of the published models: Llama-2-7B, Llama-2-13B, Granite-20B-code."""
    script = runpy.run_path(str(RECIPES / "benchmark_gpu.py"))
    with torch.device("meta"):
        sizes = {
            name: script["AutoModelForCausalLM"].from_config(config).num_parameters() / 1e9
            for name, (config, _) in script["TARGETS"].items()
        }
    assert sizes["llama2-7b"] == pytest.approx(6.74, abs=0.01)
    assert sizes["llama2-13b"] == pytest.approx(13.02, abs=0.01)
    assert sizes["granite-20b"] == pytest.approx(20.1, abs=0.1)


def test_benchmark_training(run):
    report = run("benchmark_training.py", "--target", "tiny", "--rounds", 1, "--steps", 4, "--new_tokens", 8)
    first = report["stage1"]
    assert first["step_over_parts"] == pytest.approx(first["step_s"] / (first["base_model_s"] + first["speculator_s"]))
    assert report["stage2"]["over_generate"] > 0


def test_benchmark_loss(run, monkeypatch):
    forks = multiprocessing.get_context("fork")  # which need no imports; of memory, nothing is asserted
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: forks)
    report = run("benchmark_loss.py", "--vocab_size", 500, "--inner_dim", 16, "--heads", 2, "--positions", 40)
    losses = {row["way"]: row["loss"] for row in report["rows"]}
    assert {"whole", "chunked"} <= losses.keys()
    assert losses["chunked"] == pytest.approx(losses["whole"], rel=1e-3)


def test_sweep(tmp_path):
    """Three variants, few steps a stage; what is there is not trained again."""
    base_model, corpus, output = (tmp_path / name for name in ("base_model", "corpus", "output"))
    tiny_model("llama").save_pretrained(base_model)
    words = [f"w{n}" for n in range(VOCAB)]
    word_tokenizer(words).save_pretrained(base_model)
    corpus.mkdir()
    for name, n in (("train", 40_000), ("held_out", 14_000)):
        text = " ".join(random.Random(n).choices(words, k=n))
        (corpus / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    one_head = {"new": {"n_predict": 1, "top_k_tokens_per_head": [5]}}
    stage_2_only = {"steps": [0, 3], "new": {"n_predict": 2, "top_k_tokens_per_head": [5, 3]}}
    variants = {"1 head": one_head, "2 heads": stage_2_only}
    variants["1 head, noise"] = one_head | {"stage2": {"hidden_state_noise": 0.1}}
    sweep = {"steps": [2, 2], "seeds": [0], "variants": variants}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    flags = ["--variants", tmp_path / "sweep.yaml", "--base_model", base_model, "--corpus", corpus]
    flags += ["--output_dir", output]
    times = []
    for _ in range(2):
        done = commands.run(RECIPES / "sweep.py", *flags)
        assert done.returncode == 0, done.stderr
        assert "| 2 heads | 1." in done.stdout
        assert "Without results_losses.png: fewer than two points" in done.stdout  # of so few steps none are logged
        times.append({path: path.stat().st_mtime for path in output.rglob("model.safetensors")})
    assert len(times[0]) == 5
    assert times[0] == times[1]
    weights = {path.relative_to(output).as_posix(): load_file(path)["speculator.emb.0.weight"] for path in times[0]}
    same, other = (
        [weights[f"{name}-0/stage{stage}/model.safetensors"] for name in ("1_head", "1_head,_noise")]
        for stage in (1, 2)
    )
    assert torch.equal(*same)  # trained once, copied
    assert not torch.equal(*other)
    report = json.loads((output / "results.json").read_text())
    assert [row["variant"] for row in report["rows"]] == list(variants)
    assert report["rows"][0]["n_predict"] == 1
    assert report["rows"][0]["losses"].keys() == {"stage1", "stage2"}
    plots = {path.name for path in output.glob("*.png")}
    assert plots == {"results_tokens_per_step.png", "results_by_heads.png"}
    assert report["base_model"] == str(base_model)


def trained(n_predict=2, greedy=(2.0, 2.2), steps=(20, 40, 60)):
    """Rows of a variant, of two seeds."""
    losses = {stage: [[step, 6.0 / step] for step in steps] for stage in ("stage1", "stage2")}
    return [{"n_predict": n_predict, "losses": losses, "greedy": value, "sampled": value / 2} for value in greedy]


def test_losses_of_different_kinds_have_panels_of_their_own():
    kl = {"loss": ["forward_kl"], "target_temperature": 0.25}
    mixed = {"loss": ["cross_entropy", "forward_kl"], "loss_weights": [0.5, 0.5]}
    variants = {"published": {}, "noise": {"hidden_state_noise": 0.1}, "KL": {"loss": "forward_kl"}}
    variants |= {"KL in stage 2": {"stage2": kl}, "mixed in stage 2": {"stage2": mixed}}
    figure = load("plot_sweep.py").losses({name: trained() for name in variants}, variants, "of org/base\na CPU")
    panels = {axes.get_title(): axes for axes in check_figure(figure, "org/base", "a CPU")}
    assert {title: len(axes.lines) for title, axes in panels.items()} == {
        "stage 1: cross_entropy": 4,
        "stage 1: forward_kl": 1,
        "stage 2: cross_entropy": 2,
        "stage 2: forward_kl": 1,
        "stage 2: forward_kl\ntarget_temperature 0.25": 1,
        "stage 2: cross_entropy + forward_kl\nloss_weights [0.5, 0.5]": 1,
    }
    assert all(ticks(axes) == [20, 40, 60] for axes in panels.values())
    assert panels["stage 2: forward_kl"].lines[0].get_ydata().tolist() == [0.15, 0.075, 0.05]  # of each of two heads
    assert set(names(figure)) == set(variants)


def test_plots_of_tokens_per_step():
    plot_sweep = load("plot_sweep.py")
    by_variant = {f"a variant with a long name, {n} heads": trained(n) for n in (1, 2, 7)}
    (axes,) = check_figure(figure := plot_sweep.tokens_per_step(by_variant, "of org/base"), "org/base")
    assert [label.get_text() for label in axes.get_yticklabels()] == list(by_variant)
    assert names(figure) == ["greedy, a seed", "greedy, mean", "sampled, a seed", "sampled, mean"]
    (axes,) = check_figure(plot_sweep.over_heads({7: trained(), 1: trained(greedy=(1.0, 1.2))}, "of org/base"))
    assert ticks(axes) == [1, 7] and axes.get_xlabel() == "heads"
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([1.1, 2.1])


def test_there_is_no_plot_of_one_variant_or_no_losses():
    plot_sweep, one = load("plot_sweep.py"), {"one": trained(steps=[20])}
    assert plot_sweep.tokens_per_step(one, "") is None
    assert plot_sweep.over_heads({2: trained()}, "") is None
    assert plot_sweep.losses(one, {"one": {}}, "") is None
