"""What people read: the help of every command, the lines of a training, and what a command says last."""

import argparse
import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from test_head_to_head import load
from trainings import arguments
from transformers import PrinterCallback, ProgressCallback, TrainerState, TrainingArguments
from transformers.hf_argparser import string_to_bool

from modeling_speculator import doctor
from modeling_speculator.trainers import (
    DataArguments,
    ModelArguments,
    SpeculatorTrainingArguments,
    next_commands,
    parse_recipe,
)
from modeling_speculator.trainers.log_lines import LogLines, in_short, log_line
from modeling_speculator.trainers.run_folder import delete_training


ROOT = Path(__file__).parents[1]
OURS = {field.name for cls in (ModelArguments, DataArguments) for field in fields(cls)}
OURS |= {field.name for field in fields(SpeculatorTrainingArguments)} - {
    field.name for field in fields(TrainingArguments)
}
COMMANDS = sorted(path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.py"))


# Help


class Shown(Exception):
    """Carries a parser, at the moment when it would parse."""


@pytest.fixture
def parser_of(monkeypatch):
    def show(parser, *args, **kwargs):
        raise Shown(parser)

    def parser_of_(command: str) -> argparse.ArgumentParser:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", show)
        monkeypatch.setattr(sys, "argv", [command])
        with pytest.raises(Shown) as shown:
            (doctor if command == "doctor" else load(command)).main()
        return shown.value.args[0]

    return parser_of_


def problems(parser: argparse.ArgumentParser) -> list[str]:
    """Options that are shown and lack a help, the unit of their value, or their default."""
    shown, formatter, found = parser.format_help(), parser.formatter_class(parser.prog), []
    one_of = [action for group in parser._mutually_exclusive_groups for action in group._group_actions]
    for action in parser._actions:
        name = (action.option_strings or [action.metavar])[0]
        if f"\n  {name}" not in shown:
            continue
        words = formatter._expand_help(action) if action.help else ""
        if not words.partition("(default: ")[0]:
            found.append(f"{name} has no help")
        if action.nargs != 0 and not (action.metavar or action.choices or action.type is string_to_bool):
            found.append(f"{name} has no unit")
        is_needed = action.required or action.nargs == 0 or action in one_of
        if not is_needed and not re.search(r"\(default: .+\)$", words):
            found.append(f"{name} has no default")
    return found


@pytest.mark.parametrize("command", [*COMMANDS, "doctor"])
def test_every_option_has_help_unit_and_default(parser_of, command):
    parser = parser_of(command)
    assert problems(parser) == []
    ours = [action for action in parser._actions if command != "train_speculator.py" or action.dest in OURS]
    names = [name for action in ours for name in action.option_strings[:1] if not name.startswith("--no_")]
    assert names and all(f"\n  {name}" in parser.format_help() for name in names)


def test_a_poor_option_is_found():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", help="of a prompt (default: 1)")
    parser.add_argument("--rounds", metavar="ROUNDS", help="(default: 1)")
    parser.add_argument("--limit", metavar="PROMPTS", help="at most")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--right", metavar="PROMPTS", help="at most (default: all)")
    assert problems(parser) == [
        *("--tokens has no unit", "--rounds has no help", "--limit has no default", "--quiet has no help")
    ]


def test_the_help_of_a_training(capsys):
    """The project's own options, by groups; all of them where asked for."""
    shown = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as end:
            parse_recipe(["--base_model", "x", flag], description="Trains.\n\nSomething.")
        assert end.value.code == 0
        shown[flag] = capsys.readouterr().out
    ours, everything = shown["--help"], shown["--help_all"]
    sections = re.findall(r"^(\S.*):$", ours, re.MULTILINE)
    assert sections == ["options", "model", "data", "speculator training"]
    assert "Trains.\n\nSomething." in ours and "--help_all shows those, too" in ours
    assert "--sequence_length TOKENS" in ours and "stage 1: of a sequence (default: 4096)" in ours
    assert "--sequence-length" not in ours and "--no_" not in everything
    theirs = ("--output_dir", "--max_steps", "--logging_steps", "--learning_rate")
    assert all(f"\n  {name} " in everything and f"\n  {name} " not in ours for name in theirs)
    assert len(everything) > 2 * len(ours) and everything.startswith(ours[:100])


# The lines of a training


STATE = TrainerState(global_step=20, max_steps=120)


def test_a_line_of_a_training():
    accuracies = {f"accuracy_head_{head}": value for head, value in ((1, 0.074), (2, 0.051), (3, 0.049))}
    log = {"loss": 6.3138, "grad_norm": 1.0, "tokens_per_second": 1812.3, "accuracy_top_k_head_1": 0.5} | accuracies
    assert log_line(log, 20, STATE, 1.8) == "step 20/120  loss 6.31  heads 7 / 5 / 5 %  1,812 tokens/s  3 min left"
    assert log_line(log, 120, STATE, 1.8).endswith(" tokens/s")
    assert log_line({"loss": 6.3138}, 20, STATE) == "step 20/120  loss 6.31"


def test_a_line_of_an_evaluation():
    log = {"eval_runtime": 1.0, "eval_loss": 5.5, "eval_accuracy_head_1": 0.5, "eval_accuracy_head_2": 0.251}
    log |= {"eval_tokens_per_step": 1.94, "eval_tokens_per_step_sampled": 1.5, "eval_loss_head_1": 2.0}
    line = "evaluation at step 60: loss 5.5, heads 50 / 25 %, 1.94 tokens per step, 1.50 sampled"
    assert log_line(log, 60, STATE) == line
    log = {"eval_code_loss": 5.5, "eval_code_runtime": 1.0}
    assert log_line(log, 60, STATE) == "evaluation of code at step 60: loss 5.5"
    assert log_line({"train_runtime": 175.0, "train_loss": 6.0}, 60, STATE) == "training ended at step 60 after 3 min"
    assert log_line({"something": 1.0}, 60, STATE) is None


def test_times_in_short():
    assert [in_short(seconds) for seconds in (0.4, 119.4, 119.6, 170, 3599, 7800)] == [
        *("0 s", "119 s", "2 min", "3 min", "1 h 0 min", "2 h 10 min")
    ]


@pytest.mark.parametrize("disable_tqdm", [False, True], ids=["bars", "no bars"])
def test_what_a_training_shows(tmp_path, llama, make_trainer, capsys, disable_tqdm):
    """A line a log on stdout, named bars on stderr, and everything in a file, which a run that goes on adds to."""
    options = {"eval_strategy": "steps", "eval_steps": 4, "evaluation_prompts": 2, "disable_tqdm": disable_tqdm}
    trainer = make_trainer(llama, arguments(tmp_path, **options))
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(LogLines) == 1 and not {PrinterCallback, ProgressCallback} & {*kinds}
    trainer.train()
    out, err = capsys.readouterr()
    step = "step N/N  loss N  heads N / N / N %  N tokens/s"
    assert [re.sub(r"\d+([.,]\d+)*", "N", line) for line in out.splitlines()] == [
        f"{step}  N s left",
        step,
        "evaluation at step N: loss N, heads N / N / N %, N tokens per step, N sampled",
        "training ended at step N after N s",
    ]
    for name in ("training", "evaluating", "texts to evaluate on"):
        assert (f"{name}: " in err) != disable_tqdm

    def logged():
        return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    first = logged()
    assert [record["step"] for record in first] == [0, 2, 4, 4, 4]
    began, *records = first
    assert began.keys() == {"began", "step", "max_steps"} and began["max_steps"] == 4
    history = [{key: value for key, value in log.items() if key != "total_flos"} for log in trainer.state.log_history]
    assert [{key: value for key, value in record.items() if key != "total_flos"} for record in records] == history
    make_trainer(llama, arguments(tmp_path, max_steps=6, **options)).train(resume_from_checkpoint=True)
    assert logged()[: len(first)] == first and logged()[len(first)]["step"] == 4
    delete_training(tmp_path)
    assert not (tmp_path / "log.jsonl").exists()


def test_only_the_main_process_shows_anything(tmp_path, llama, make_trainer, capsys):
    trainer = make_trainer(llama, arguments(tmp_path, disable_tqdm=False, evaluation_prompts=0))
    trainer.state.is_world_process_zero = False
    lines, state = LogLines(), TrainerState(is_world_process_zero=False, max_steps=4)
    for event in ("on_train_begin", "on_step_end", "on_evaluate", "on_train_end"):
        getattr(lines, event)(trainer.args, state, trainer.control)
    lines.on_log(trainer.args, state, trainer.control, logs={"loss": 1.0})
    lines.on_prediction_step(trainer.args, state, trainer.control, eval_dataloader=[1])
    assert capsys.readouterr() == ("", "") and not (tmp_path / "log.jsonl").exists()


def test_the_evaluation_of_the_best_weights_has_their_step(tmp_path, capsys):
    args = arguments(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
    lines, state = LogLines(), TrainerState(global_step=4, max_steps=4, best_global_step=2)
    for is_loaded in (False, True):
        if is_loaded:
            lines.on_train_end(args, state, None)
        lines.on_log(args, state, None, logs={"eval_runtime": 1.0, "eval_loss": 1.0})
    assert capsys.readouterr().out.splitlines() == [f"evaluation at step {step}: loss 1" for step in (4, 2)]


# What comes next


@pytest.fixture
def recipes(tmp_path):
    """The recipes of both stages, of one folder."""
    here = f"base_model: base\nuse_cpu: true\ndata_files: [text.txt]\noutput_dir: {tmp_path}/stage"
    (tmp_path / "stage1.yaml").write_text(f"{here}1\nstage: 1\n")
    (tmp_path / "stage2.yaml").write_text(f"{here}2\nstage: 2\nspeculator: {tmp_path}/stage1\n")
    return tmp_path


def then(argv: list) -> dict[str, list[str]]:
    argv = [str(part) for part in argv]
    model, _, args = parse_recipe(argv)
    return {what: shlex.split(command) for what, command in next_commands(argv, model, args).items()}


def test_stage_2_comes_after_stage_1(recipes, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    (command,) = then(["--config", recipes / "stage1.yaml"]).values()
    assert command == ["python", "recipes/train_speculator.py", "--config", str(recipes / "stage2.yaml")]
    flags = ["--base_model", "mine", "--data_files", "a b.txt", "c.txt", "--max_steps", 9, "--n_predict", 4]
    (command,) = then(["--config", recipes / "stage1.yaml", *flags, "--output_dir", tmp_path / "my/stage1"]).values()
    _, *passed = command[3:]
    assert passed == [
        *("--base_model", "mine", "--data_files", "a b.txt", "c.txt", "--speculator", str(tmp_path / "my/stage1")),
        *("--output_dir", str(tmp_path / "my/speculator")),
    ]
    model, data, args = parse_recipe(command[2:])  # which a training takes
    assert (model.base_model, data.data_files, args.stage) == ("mine", ["a b.txt", "c.txt"], 2)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    (command,) = then(["--config", recipes / "stage1.yaml"]).values()
    assert command[:4] == ["accelerate", "launch", "--config_file", "recipes/accelerate_configs/single.yaml"]
    assert (ROOT / command[3]).is_file()


def test_what_uses_a_speculator_comes_after_stage_2(recipes, monkeypatch):
    commands = then(["--config", recipes / "stage2.yaml"])
    scripts = [command[1] for command in commands.values()]
    assert scripts == [f"recipes/{name}.py" for name in ("generate", "evaluate_acceptance", "push_to_hub")]
    for command in commands.values():
        monkeypatch.setattr(sys, "argv", command[1:])
        args = load(command[1].removeprefix("recipes/")).parse_args()
        assert Path(args.speculator) == recipes / "stage2"


def test_nothing_is_known_to_come_after_a_stage_1_alone(recipes):
    (recipes / "stage2.yaml").unlink()
    assert then(["--config", recipes / "stage1.yaml"]) == {}
    assert then(["--base_model", "base", "--output_dir", recipes, "--use_cpu", "true"]) == {}
