"""A training never mixes and never lies: what a run into a folder finds there, goes on with, refuses or deletes."""

import importlib.util
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_models import VOCAB, tiny_model, word_tokenizer
from transformers import TrainingArguments

from modeling_speculator.trainers import latest_checkpoint, parse_recipe, read_record, recipe_settings
from modeling_speculator.trainers.run_record import differences
from modeling_speculator.trainers.run_settings import training_settings


RECIPE = Path(__file__).parents[1] / "recipes/train_speculator.py"
WORDS = [f"word{n}" for n in range(VOCAB)]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A base model, a text, and flags that say how to train on them."""
    folder = tmp_path_factory.mktemp("given")
    tiny_model("llama").save_pretrained(folder / "base_model")
    word_tokenizer(WORDS).save_pretrained(folder / "base_model")
    (folder / "text.txt").write_text(" ".join(random.Random(0).choices(WORDS, k=2000)))
    return folder


def flags_of(given: Path, output_dir: Path, **flags) -> list[str]:
    flags = {
        "base_model": given / "base_model",
        "data_files": given / "text.txt",
        "output_dir": output_dir,
        "use_cpu": "true",
        "n_predict": 2,
        "inner_dim": 16,
        "top_k_tokens_per_head": [3, 2],
        "n_candidates": 4,
        "sequence_length": 16,
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 4,
        "evaluation_prompts": 0,
        "report_to": "none",
        "disable_tqdm": "true",
    } | flags
    parts = {key: value if isinstance(value, list) else [value] for key, value in flags.items() if value is not None}
    return [part for key, values in parts.items() for part in (f"--{key}", *map(str, values))]


@pytest.fixture
def recipe(monkeypatch):
    """The recipe's `main`, in this process."""
    spec = importlib.util.spec_from_file_location("train_speculator", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(flags: list[str]) -> None:
        monkeypatch.setattr("sys.argv", [str(RECIPE), *flags])
        module.main()

    run.module = module
    return run


@pytest.fixture(scope="module")
def trained(given, tmp_path_factory):
    """A finished training."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        recipe.__wrapped__(monkeypatch)(flags_of(given, folder))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, elsewhere: a moved folder is the same training."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def settings_of(flags):
    return recipe_settings(*parse_recipe(flags))


# What decides


OTHER = {
    "loss": "total_variation",
    "learning_rate": 0.5,
    "seed": 1,
    "data_seed": 1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "n_predict": 3,
    "inner_dim": 32,
    "method": "sum_lstm",
    "tie_weights": "true",
    "sequence_length": 32,
    "validation_fraction": 0.5,
    "parabolic_schedule": "false",
    "warmup_steps": 1,
    "weight_decay": 0.0,
    "adam_beta1": 0.5,
    "max_grad_norm": 2.0,
    "optim": "sgd",
    "bf16": "true",
    "base_model_dtype": "bfloat16",
    "dataloader_drop_last": "true",
    "max_steps": 1,
    "text_column": "other",
    "head_weights": [1.0, 0.5],
    "hidden_state_noise": 0.1,
}


@pytest.fixture
def found(trained):
    return read_record(trained)


@pytest.mark.parametrize("key", OTHER)
def test_what_decides_is_compared(given, found, tmp_path, key):
    (line,) = differences(found, settings_of(flags_of(given, tmp_path, **{key: OTHER[key]})))
    assert line.split("was")[0].count(key) == 1  # the batch's name has that of both of its parts


def test_the_stage_decides(given, found, tmp_path):
    lines = differences(found, settings_of(flags_of(given, tmp_path, stage=2, prompt_length=8)))
    assert any(line == "`stage` was 1, is 2" for line in lines)


HOW = {
    "logging_steps": 1,
    "save_steps": 2,
    "save_total_limit": 1,
    "eval_strategy": "steps",
    "evaluation_prompts": 3,
    "prompt_length": 4,
    "generation_length": 9,
    "dataloader_num_workers": 1,
    "report_to": "tensorboard",
    "run_name": "other",
    "hub_model_id": "org/name",
    "torch_empty_cache_steps": 5,
    "max_steps": 100,
}


@pytest.mark.parametrize("key", HOW)
def test_what_says_how_to_run_is_not(given, found, tmp_path, key):
    assert differences(found, settings_of(flags_of(given, tmp_path, **{key: HOW[key]}))) == []


def test_the_batch_counts_as_a_whole(given, found, tmp_path, monkeypatch):
    halved = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert differences(found, settings_of(flags_of(given, tmp_path, **halved))) == []
    model, data, args = parse_recipe(flags_of(given, tmp_path, per_device_train_batch_size=2))
    monkeypatch.setattr(type(args), "world_size", 2)
    assert differences(found, recipe_settings(model, data, args)) == []
    monkeypatch.setattr(type(args), "world_size", 3)
    (line,) = differences(found, recipe_settings(model, data, args))
    assert "x processes` was 4, is 6" in line


@dataclass
class LaterArguments(TrainingArguments):
    """Of a transformers that is yet to come."""

    some_new_key: float = 0.0


def test_a_key_that_is_new_counts_where_it_is_set(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    before = training_settings(TrainingArguments(**options)).values
    assert differences(before, training_settings(LaterArguments(**options))) == []
    (line,) = differences(before, training_settings(LaterArguments(**options, some_new_key=0.5)))
    assert line == "`some_new_key` was None, is 0.5"
    before = training_settings(LaterArguments(**options, some_new_key=0.5)).values
    assert differences(before, training_settings(TrainingArguments(**options))) == []  # there is no such key any more


def test_epochs_can_be_raised_too(tmp_path):
    def settings(**steps):
        return training_settings(TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **steps))

    three = settings(num_train_epochs=3).values
    assert differences(three, settings(num_train_epochs=4)) == []
    assert len(differences(three, settings(num_train_epochs=2))) == 1
    assert len(differences(three, settings(max_steps=100))) == 1  # another schedule, of nobody knows which length
    steps = settings(max_steps=100).values
    assert differences(steps, settings(max_steps=100, num_train_epochs=7)) == []  # which counts for nothing then


# Going on and being refused


def test_another_setting_is_refused_before_the_base_model_is_loaded(given, run, recipe, monkeypatch):
    monkeypatch.setattr(recipe.module, "load_base_model", lambda *args: pytest.fail("it was loaded"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(ValueError) as error:
        recipe(flags_of(given, run, learning_rate=0.5, seed=7))
    text = str(error.value)
    assert "`learning_rate` was 0.001, is 0.5" in text and "`seed` was 42, is 7" in text
    assert "another `output_dir`" in text and "`--overwrite_output_dir true`" in text
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "run.lock"} == {
        path: time for path, time in before.items() if path.name != "run.lock"
    }


def test_an_unfinished_training_refuses_too(given, run, recipe):
    for finished in ("model.safetensors", "trainer_state.json", "config.json"):
        (run / finished).unlink()
    with pytest.raises(ValueError, match="`seed` was 42, is 7"):
        recipe(flags_of(given, run, seed=7))


def test_a_changed_file_is_refused_and_a_moved_one_is_not(given, run, recipe, tmp_path, capsys):
    moved = Path(shutil.copytree(given, tmp_path / "moved"))
    recipe(flags_of(moved, run))
    assert "Resuming from" in capsys.readouterr().out
    text = moved / "text.txt"
    text.write_text(text.read_text()[:-1] + "0")
    with pytest.raises(ValueError, match=r"`data_files` was '.*text.txt' \(sha256:\w{12}\), is '.*text.txt' \(sha256"):
        recipe(flags_of(moved, run))
    tiny_model("llama", seed=1).save_pretrained(moved / "base_model")
    with pytest.raises(ValueError, match="`base_model` was"):
        recipe(flags_of(moved, run))


def test_more_steps_extend_the_schedule_and_say_so(given, run, recipe, caplog, capsys):
    recipe(flags_of(given, run, max_steps=3, logging_steps=1))
    assert "`max_steps` is raised from 2 to 3" in caplog.text and "schedule" in caplog.text
    assert "checkpoint-2" in capsys.readouterr().out
    assert latest_checkpoint(run).endswith("checkpoint-3")
    with pytest.raises(ValueError, match=r"`max_steps` was 3, is 2 \(it can only be raised\)"):
        recipe(flags_of(given, run))


def test_a_folder_of_an_older_version_is_refused(given, run, recipe):
    (run / "run.json").unlink()
    for leave in ("checkpoint-2", "model.safetensors"):
        with pytest.raises(ValueError, match="as older versions left it.*`output_dir`, or `--overwrite_output_dir tr"):
            recipe(flags_of(given, run))
        path = run / leave
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    recipe(flags_of(given, run, overwrite_output_dir="true", max_steps=1))
    assert latest_checkpoint(run).endswith("checkpoint-1")


def test_overwriting_deletes_what_a_training_wrote_and_nothing_else(given, run, recipe, capsys):
    kept = [
        run / "notes.txt",
        run / "runs/mine.txt",
        run / "checkpoint-best/model.safetensors",
        run / "acceptance.json",
    ]
    events = run / "runs/Nov27/events.out.tfevents.1.host"
    adapter = run / "adapter_model.safetensors"
    for path in (*kept, events, adapter):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("mine")
    recipe(flags_of(given, run, seed=7, max_steps=1, overwrite_output_dir="true"))
    assert all(path.read_text() == "mine" for path in kept)
    assert not events.parent.exists() and not adapter.exists()
    assert "Resuming" not in capsys.readouterr().out
    assert [path.name for path in run.glob("checkpoint-?")] == ["checkpoint-1"]
    assert read_record(run)["seed"] == 7


def test_beginning_anew_is_a_run_of_its_own(given, run, recipe, capsys):
    def identities():
        return [
            json.loads((run / name / "complete.json").read_text())["run"] for name in ("checkpoint-1", "checkpoint-2")
        ]

    (before, _) = identities()
    with pytest.raises(ValueError, match="`seed` was 42, is 7"):
        recipe(flags_of(given, run, resume_from_checkpoint="false", seed=7))
    recipe(flags_of(given, run, resume_from_checkpoint="false", save_steps=2))
    assert "Resuming" not in capsys.readouterr().out
    (older, newer) = identities()
    assert older == before != newer
    shutil.rmtree(run / "checkpoint-2")
    assert latest_checkpoint(run) is None


def test_nothing_is_left_of_a_start_that_failed(given, tmp_path, recipe):
    with pytest.raises(ValueError, match="so set `text_column`"):
        recipe(flags_of(given, tmp_path / "run", text_column="other"))
    assert not (tmp_path / "run").exists()
    recipe(flags_of(given, tmp_path / "run"))  # and nothing to compare with
    assert latest_checkpoint(tmp_path / "run").endswith("checkpoint-2")


def test_the_record_is_written_before_anything_is_saved(given, run, recipe):
    """Killed during its first save, a training goes on by the same command, and by no other."""
    for path in run.glob("checkpoint-*/complete.json"):
        path.unlink()
    (run / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="`seed`"):
        recipe(flags_of(given, run, seed=7))
    recipe(flags_of(given, run))
    assert latest_checkpoint(run).endswith("checkpoint-2")


def test_a_checkpoint_from_elsewhere_counts_by_what_it_holds(given, run, recipe, tmp_path):
    other = tmp_path / "other"
    recipe(flags_of(given, other, max_steps=3, resume_from_checkpoint=run / "checkpoint-1"))
    assert read_record(other)["resume_from_checkpoint"]["name"].endswith("checkpoint-1")
    with pytest.raises(ValueError, match="`resume_from_checkpoint` was .*checkpoint-1.*, is .*checkpoint-2"):
        recipe(flags_of(given, other, max_steps=3, resume_from_checkpoint=run / "checkpoint-2"))
    shutil.copytree(run / "checkpoint-2", other / "checkpoint-9")
    with pytest.raises(ValueError, match="no complete checkpoint of the training in"):
        recipe(flags_of(given, other, max_steps=9, resume_from_checkpoint=other / "checkpoint-9"))


def test_segments_say_how_each_stretch_ran(given, run, recipe):
    def told():
        return json.loads((run / "provenance.json").read_text())

    assert "segments" not in told()
    (run / "model.safetensors").unlink()  # interrupted at step 1
    shutil.rmtree(run / "checkpoint-2")
    recipe(flags_of(given, run))
    assert "segments" not in told()  # of the same settings, on the same machine
    recipe(flags_of(given, run, max_steps=4, logging_steps=1))
    halved = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    recipe(flags_of(given, run, max_steps=5, logging_steps=1, **halved))
    first, second, third = told()["segments"]
    assert [part["steps"] for part in (first, second, third)] == [[1, 2], [3, 4], [5, 5]]
    assert [part["arguments"]["max_steps"] for part in (first, second, third)] == [2, 4, 5]
    assert third["arguments"]["gradient_accumulation_steps"] == 2
    assert sum(part["seconds"] for part in (first, second, third)) == pytest.approx(told()["seconds"], abs=0.2)
    assert {"machine", "versions", "processes", "git_revision"} <= first.keys()
    assert (told()["steps"], told()["arguments"]["max_steps"]) == (5, 5)  # as of the last one, as ever
