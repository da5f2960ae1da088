"""The commands, as somebody mistypes them: one line that names what is wrong, before anything takes long."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import listen_to_ctrl_c
from tiny_models import VOCAB, character_tokenizer, tiny_model

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.command_line import INTERRUPTED


RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    tiny_model("llama").save_pretrained(folder / "base")
    character_tokenizer(eos_token="z").save_pretrained(folder / "base")
    for name, width in (("speculator", 32), ("of_another", 16)):
        config = MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=width, base_model_name_or_path="org/base")
        MLPSpeculatorPreTrainedModel(config).save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("abcdefghijklmnop\nqrstuvwxyabcdefg\n")
    (folder / "file").touch()
    return folder


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    """What a command says of arguments that it can't take; it has to end with that, and in a line."""

    def refused_(script: str, *flags) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [str(RECIPES / script), *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(RECIPES / script), run_name="__main__")
        said = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.splitlines()[-1]
        assert end.value.code and "\n" not in said
        assert said.startswith(f"{Path(script).name}: error: ")
        return said

    return refused_


MODELS = ("--base_model", "base", "--speculator", "speculator")
MEASURE = (*MODELS, "--prompts", "prompts.txt")
COMMANDS = {  # what each needs, and where it writes
    "evaluate_acceptance.py": (*MEASURE, "--output", "out"),
    "benchmark_latency.py": (*MEASURE, "--output", "out"),
    "tune.py": (*MEASURE, "--output", "out"),
    "check_quality.py": (*MEASURE, "--output", "out.json"),
    "generate.py": (*MODELS, "--prompt", "abc"),
    "benchmark_step.py": ("--output", "out.json"),
    "benchmark_loss.py": ("--output", "out.json"),
    "benchmark_training.py": ("--target", "tiny", "--output", "out.json"),
    "benchmark_gpu.py": ("--device", "cpu", "--targets", "tiny", "--output", "out.json"),
    "convert.py": ("--speculator", "speculator", "--to", "mlp_speculator", "--output", "out"),
    "sweep.py": ("--variants", RECIPES / "sweeps/heads.yaml", "--base_model", "base", "--results", "out.json"),
    "head_to_head.py": ("--base_model", "base", "--corpus", ".", "--output_dir", "out"),
}
WRONG_NUMBERS = {
    "evaluate_acceptance.py": ["--limit -3", "--limit 0", "--batch_size 0", "--max_new_tokens 0", "--prompt_length 0"]
    + ["--n_candidates -1", "--n_tree_nodes 0", "--n_heads 0", "--top_k_tokens_per_head 0"]
    + ["--temperature -1", "--temperature nan", "--top_p 2", "--top_p 0", "--top_k -1"],
    "benchmark_latency.py": ["--rounds 0", "--batch_size 1 0", "--prompt_length -5", "--n_prompts 0", "--threads 0"]
    + ["--n_candidates -1", "--max_new_tokens 0", "--drafters medusa"],
    "tune.py": ["--rounds 0", "--batch_size 0", "--prompt_length 0", "--n_prompts -1", "--max_new_tokens 1"],
    "check_quality.py": [
        "--limit 0",
        "--samples 0",
        "--batch_size -2",
        "--temperature 0",
        "--top_p 1.5",
        "--top_k -1",
    ],
    "generate.py": ["--batch_size 0", "--max_new_tokens 0", "--temperature -1", "--n_candidates -1", "--n_heads 0"],
    "benchmark_step.py": ["--rounds 0", "--threads 0", "--max_new_tokens 0"],
    "benchmark_loss.py": ["--positions 0", "--heads 0", "--vocab_size -1", "--chunk_elements 0"],
    "benchmark_training.py": ["--rounds 0", "--steps 1", "--new_tokens 0"],
    "benchmark_gpu.py": ["--batch_sizes 0", "--contexts 0", "--rounds 0", "--steps 0"],
    "sweep.py": ["--jobs 0", "--inner_dim 0"],
    "head_to_head.py": ["--inner_dim 0", "--n_candidates -1", "--batch_size 0", "--prompt_length 0"],
}


@pytest.mark.parametrize("script", WRONG_NUMBERS)
def test_numbers(refused, script):
    for flags in WRONG_NUMBERS[script]:
        said = refused(script, *COMMANDS[script], *flags.split())
        assert flags.split()[0] in said


@pytest.mark.parametrize("script", [script for script in COMMANDS if script != "generate.py"])
def test_places_that_nothing_can_be_written_to(refused, script):
    """Before a model is loaded: none is there."""
    moved = {"out": "file/out", "out.json": "file/out.json", "base": "nowhere", "speculator": "nowhere"}
    assert "nothing can be written to" in refused(script, *(moved.get(part, part) for part in COMMANDS[script]))


MODEL_COMMANDS = ["evaluate_acceptance.py", "benchmark_latency.py", "tune.py", "check_quality.py", "generate.py"]


@pytest.mark.parametrize("script", MODEL_COMMANDS)
def test_models(refused, script):
    short = {"tune.py": ("--prompt_length", 8, "--n_prompts", 2)}.get(script, ())

    def with_models(base_model: str, speculator: str) -> str:
        models = ("--base_model", base_model, "--speculator", speculator)
        return refused(script, *models, *COMMANDS[script][len(models) :], "--max_new_tokens", 8, *short)

    assert "There is no folder 'nowhere/base' here" in with_models("nowhere/base", "speculator")
    assert "speculator is a speculator, not a base model" in with_models("speculator", "speculator")
    assert "There is no folder 'nowhere/speculator' here" in with_models("base", "nowhere/speculator")
    if script != "benchmark_latency.py":  # where a language model may draft, and what can't is told in its row
        assert "base is a model of type 'llama', no speculator" in with_models("base", "base")
        assert "it was made for org/base" in with_models("base", "of_another")


@pytest.mark.parametrize("script", MODEL_COMMANDS)
def test_prompts(refused, script):
    flags = [part for part in COMMANDS[script] if part not in ("--prompts", "prompts.txt", "--prompt", "abc")]
    assert "nowhere.jsonl: there is no such file" in refused(script, *flags, "--prompts", "nowhere.jsonl")


@pytest.mark.parametrize("script", ["evaluate_acceptance.py", "tune.py", "benchmark_latency.py"])
def test_prompts_that_are_longer_than_any(refused, script):
    said = refused(script, *COMMANDS[script], "--prompt_length", 5000)
    assert "No prompt has 5000 tokens" in said or "are more than the 128 positions of the base model" in said


def test_files_that_are_something_else(refused, folder):
    (folder / "some.json").write_text("[]")
    assert "some.json is no results.json of sweep.py" in refused("plot_sweep.py", "some.json")
    assert "needs `steps`, `seeds` and `variants`" in refused("sweep.py", "--variants", "prompts.txt")
    (folder / "broken.yaml").write_text("steps: [1")
    assert "line 1" in refused("sweep.py", "--variants", "broken.yaml")
    push = ("--speculator", "speculator", "--repo_id", "org/name", "--dry_run")
    assert "prompts.txt is no JSON" in refused("push_to_hub.py", *push, "--acceptance", "prompts.txt")
    assert "There is no folder nowhere" in refused("push_to_hub.py", *push[2:], "--speculator", "nowhere")
    assert "base is a model of type 'llama', no speculator" in refused(
        "convert.py", "--speculator", "base", "--to", "arctic", "--output", "new"
    )


def test_training(refused):
    config = ("--config", RECIPES / "quickstart/stage1.yaml", "--output_dir", "out", "--data_files", "prompts.txt")
    assert "There is no folder 'nowhere/base' here" in refused(
        "train_speculator.py", *config, "--base_model", "nowhere/base"
    )
    assert "`max_steps` must be" in refused("train_speculator.py", *config, "--base_model", "base", "--max_steps", 0)
    assert "there is no such file" in refused("train_speculator.py", "--config", "nowhere.yaml")


def test_ctrl_c_in_a_measurement(folder):
    """One line, and the same command goes on; none of transformers, none of a progress bar."""
    (folder / "many.txt").write_text("abcdefghijklmnop\n" * 2000)
    flags = (
        *MODELS,
        "--prompts",
        "many.txt",
        "--output",
        "interrupted",
        "--batch_size",
        "1",
        "--max_new_tokens",
        "99",
    )
    command = [sys.executable, str(RECIPES / "evaluate_acceptance.py"), *flags]
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True, "preexec_fn": listen_to_ctrl_c}
    with subprocess.Popen(command, cwd=folder, **options) as process:
        records = folder / "interrupted/greedy.jsonl"
        while process.poll() is None and not (records.is_file() and records.read_text().count("\n") > 2):
            pass
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED
    assert stderr.splitlines()[-1].startswith("evaluate_acceptance.py: interrupted. What is done is kept: the same")
    assert "Traceback" not in stderr
