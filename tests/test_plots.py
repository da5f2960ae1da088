"""Plots: what a title names, where ticks are, and what is said where there is nothing to draw, or to draw with."""

import json
import sys

import pytest
from figures import check_figure, names, ticks
from test_head_to_head import load

from modeling_speculator.measuring import plots


CPU = {"processor": "a CPU", "threads": 2}
MODELS = {"base model": "org/base-7b", "speculator": "/long/way/to/run/stage2"}


def test_a_title_names_models_and_machine():
    shown = plots.title("Speed", MODELS, CPU).replace(plots.NO_BREAK, " ")
    assert shown == "Speed\nbase model org/base-7b, speculator run/stage2\na CPU, 2 threads"
    assert plots.title("Speed", {}, CPU | {"gpu": "a GPU"}).endswith("\na GPU")
    assert plots.title("Speed", {}, CPU | {"threads": 1, "processor": ""}).endswith("\nCPU, 1 thread")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpt2", "gpt2"), ("org/name", "org/name"), ("/models", "/models"), ("a/b/c/", "b/c"), ("../a/b", "a/b")],
)
def test_names_of_models(name, expected):
    assert plots.short(name) == expected


def test_a_folder_by_its_place(tmp_path, monkeypatch):
    (tmp_path / "run/stage2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run/stage2")
    assert plots.short(".") == "run/stage2"


def drawn(values, is_log=False, title="A title", label="some"):
    figure, (axes,) = plots.panels(title)
    plots.line(axes, [(value, value) for value in values], 0, label)
    plots.whole_numbers(axes, values, is_log)
    axes.set(xlabel="x", ylabel="y")
    plots.legend(figure)
    return figure


@pytest.mark.parametrize(
    ("values", "is_log", "expected"),
    [
        ([1, 2, 3], False, [1, 2, 3]),
        ([4, 1, 2, 2], True, [1, 2, 4]),
        ([1, 8, 2, 4], True, [1, 2, 4, 8]),
        ([0, 1, 2, 5, 8, 16, 32], True, [0, 2, 5, 8, 16, 32]),  # no room for 1
        ([16, 17, 4000, 4096], True, [16, 4000]),
    ],
)
def test_ticks_at_what_is_shown(values, is_log, expected):
    (axes,) = check_figure(drawn(values, is_log))
    assert ticks(axes) == expected
    assert axes.get_xscale() == ("log" if is_log and 0 < min(values) <= max(values) / 8 else "linear")


def test_many_values_have_few_ticks():
    (axes,) = check_figure(drawn(range(20, 2020, 20)))
    assert 3 < len(ticks(axes)) < 12


def test_long_names_have_room():
    base, speculator = "Extremely-Long-Name-70B-" * 4, "extremely_long_name_" * 4
    title = plots.title("A title", {"base model": f"org/{base}", "speculator": f"org/{speculator}"}, CPU)
    check_figure(drawn([1, 2], title=title, label="a_long_drafter_" * 4), base, speculator, "a CPU")


def test_what_is_compared_looks_the_same_in_every_panel_and_unlike_the_others():
    styles = [plots.style(number) for number in range(20)]
    assert len({tuple(style.values()) for style in styles}) == 20
    assert len({style["marker"] for style in styles[:8]}) == len({style["color"] for style in styles[:8]}) == 8


def test_a_name_is_once_in_the_legend():
    figure, panels = plots.panels("A title", 4)
    for axes in panels:
        axes.set(xlabel="x", ylabel="y")
        for number, name in enumerate(("one", "other")):
            plots.line(axes, [(1, 2), (2, 1)], number, name)
    plots.legend(figure)
    assert len(check_figure(figure)) == 4
    assert names(figure) == ["one", "other"]


def test_what_is_written(tmp_path, capsys):
    for name in ("there.png", "nothing.png"):
        (tmp_path / name).write_text("of an earlier run")
    assert plots.write(tmp_path, {"there.png": lambda: drawn([1, 2]), "nothing.png": lambda: None}) == ["there.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"there.png"}
    assert (tmp_path / "there.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == "Without nothing.png: fewer than two points, with nothing to compare.\n"


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_without_matplotlib_a_line_says_what_to_install(tmp_path, capsys, no_matplotlib):
    assert plots.write(tmp_path, {"a.png": lambda: drawn([1, 2]), "b.png": lambda: None}) == []
    assert capsys.readouterr().out == ("Without a.png, b.png: plots need matplotlib: pip install matplotlib\n")
    assert list(tmp_path.iterdir()) == []


PLOTTING = ["tune", "benchmark_latency", "evaluate_acceptance", "plot_sweep", "quickstart/compare"]


@pytest.mark.parametrize("script", PLOTTING)
def test_no_command_needs_matplotlib_to_begin(script, no_matplotlib):
    assert load(f"{script}.py").main


@pytest.mark.parametrize("base_model", [{"base_model": "org/base"}, {}])  # files of earlier versions name none
def test_without_matplotlib_a_command_does_all_else(tmp_path, capsys, monkeypatch, no_matplotlib, base_model):
    row = {"n_predict": 1, "parameters": 1000, "greedy": 2.0, "sampled": 1.5, "losses": {}}
    results = {"rows": [row | {"variant": name} for name in ("1 head", "2 heads")], "machine": CPU} | base_model
    results["sweep"] = {"variants": {"1 head": {}, "2 heads": {}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(sys, "argv", ["plot_sweep.py", str(tmp_path / "results.json")])
    load("plot_sweep.py").main()
    *table, line = capsys.readouterr().out.splitlines()
    assert table[-1].startswith("| 2 heads | 2.000 |")
    assert line.startswith("Without results_tokens_per_step.png, ") and "pip install" in line
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
