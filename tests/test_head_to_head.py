"""The comparison of everything: its steps are commands that exist, on what the steps before have left."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import tiny_model

from modeling_speculator import command_line, precision


RECIPES = Path(__file__).parents[1] / "recipes"


def load(script):
    spec = importlib.util.spec_from_file_location(Path(script).stem, RECIPES / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def commands(monkeypatch, tmp_path):
    return commands_in(tmp_path, monkeypatch)


def commands_in(tmp_path, monkeypatch):
    """What it runs, as argument lists."""
    ran = []
    monkeypatch.setattr(command_line, "run_script", lambda *command: ran.append(["python", *map(str, command)]))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    flags = ["--base_model", str(tmp_path / "model"), "--corpus", "corpus", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["head_to_head.py", *flags, "--n_candidates", "0", "5", "--batch_size", "1", "4"])
    load("head_to_head.py").main()
    return [[Path(command[1]).resolve().relative_to(RECIPES).as_posix(), *command[2:]] for command in ran]


def test_its_steps_are_commands_that_exist(commands, monkeypatch):
    scripts = [command[0] for command in commands]
    assert scripts[:2] == ["sweep.py", "quickstart/train_base_model.py"]
    parsed = []
    for command in commands[2:]:
        monkeypatch.setattr(sys, "argv", command)
        parsed.append(load(command[0]).parse_args())
    assert set(scripts[2:]) == {"benchmark_latency.py", "evaluate_acceptance.py", "tune.py"}
    latency = [args for args, script in zip(parsed, scripts[2:], strict=True) if script == "benchmark_latency.py"]
    for args in latency:
        names = {"generate", "prompt_lookup", "early_exit", "mtp", "dflash", "speculator"}
        names |= {drafter.partition("=")[0] for drafter in args.drafters}
        assert {method.rpartition(":")[2] for method in args.methods} <= names
    assert (latency[1].n_candidates, latency[1].batch_size) == ([0, 5], [1, 4])


def test_each_step_is_announced(monkeypatch, tmp_path, capsys):
    commands = commands_in(tmp_path, monkeypatch)
    out = capsys.readouterr().out
    numbers = [line.split(":")[0] for line in out.splitlines() if line.startswith("== ")]
    assert numbers == [f"== {number} of {len(commands)}" for number in range(1, len(commands) + 1)]
    assert f"Written: {output_of(commands[0])}.json, " in out


def test_a_training_that_fails_is_shown_by_its_log(monkeypatch, tmp_path, capsys):
    sweep = load("sweep.py")

    def run_script(script, *flags, stdout, **options):
        stdout.write("step 1/2  loss 3.1\nValueError: too long\n")
        return 1

    monkeypatch.setattr(sweep, "run_script", run_script)
    folder = tmp_path / "drafters/speculator-0/stage1"
    with pytest.raises(SystemExit, match="ValueError: too long\n.*stage1 failed.*stage1/log.txt"):
        sweep.run(1, {"output_dir": folder, "max_steps": 2})
    assert f"output in {folder}/log.txt" in capsys.readouterr().out


def test_what_it_measures_is_what_it_trains(commands):
    sweep = yaml.safe_load((RECIPES / "sweeps/drafters.yaml").read_text())
    folders = {f"{name}-{seed}".replace(" ", "_") for name in sweep["variants"] for seed in sweep["seeds"]}
    measured = {part for command in commands[2:] for part in command if part.endswith("/stage2")}
    assert len(measured) == 7  # four, three of which are also given by name
    assert {Path(part).parent.name for part in measured} <= folders
    assert {Path(part.rpartition("=")[2]).parents[1] for part in measured} == {Path(output_of(commands[0]))}


def test_all_of_it_is_in_one_dtype(monkeypatch, tmp_path):
    """That which was fast when it was begun: on another machine it goes on in that."""
    for products in ({torch.float32: 1.0, torch.bfloat16: 4.0}, {torch.float32: 1.0, torch.bfloat16: 0.1}):
        monkeypatch.setattr(precision, "measure_products", lambda device, products=products: products)
        sweep, draft_model, *measurements = commands_in(tmp_path, monkeypatch)
        assert {after("--precision", command) for command in (sweep, draft_model)} == {"bfloat16"}
        assert {after("--dtype", command) for command in measurements} == {"bfloat16"}


def test_trainings_of_a_sweep_are_in_one_dtype(monkeypatch, tmp_path):
    """Likewise."""
    sweep, ran = load("sweep.py"), []
    tiny_model("llama").save_pretrained(tmp_path / "model")
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").touch()
    monkeypatch.setattr(sweep, "run", lambda stage, flags: ran.append(flags["precision"]))
    monkeypatch.setattr(sweep, "held_out_prompts", lambda args: (None, None))
    monkeypatch.setattr(sweep, "written_after", lambda prompts, base_model: {})
    monkeypatch.setattr(sweep, "ThreadPoolExecutor", lambda jobs: pytest.exit("enough"))
    flags = ["--variants", str(RECIPES / "sweeps/heads.yaml"), "--output_dir", str(tmp_path / "sweep")]
    flags += ["--base_model", str(tmp_path / "model"), "--corpus", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *flags])
    for products in ({torch.float32: 1.0, torch.bfloat16: 4.0}, {torch.float32: 1.0, torch.bfloat16: 0.1}):
        monkeypatch.setattr(precision, "measure_products", lambda device, products=products: products)
        with pytest.raises(pytest.exit.Exception, match="enough"):
            sweep.main()
    assert ran == ["bfloat16"] * 4  # both stages, twice


def after(flag, command):
    return command[command.index(flag) + 1]


def output_of(command):
    return after("--output_dir", command)
