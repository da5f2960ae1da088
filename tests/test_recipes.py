"""Recipes: what a YAML and a command line may say."""

from pathlib import Path

import pytest

from modeling_speculator.trainers import parse_recipe


ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*/stage*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(f"base_model: base\noutput_dir: {tmp_path}\nuse_cpu: true\n{text}\n")
        return ["--config", str(path)]

    return write


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_recipes_are_valid(path):
    model, data, training = parse_recipe(["--config", str(path)])
    assert training.stage == int(path.stem[-1])
    assert (data.dataset is None) != (data.data_files is None)
    if training.stage == 1:
        assert len(model.top_k_tokens_per_head) == model.n_predict
    else:
        assert model.speculator


def test_types_are_those_of_the_fields(recipe):
    model, data, training = parse_recipe(
        recipe("learning_rate: 1e-3\ntop_k_tokens_per_head: [5, 3, 2]\nspeculator: null\ndata_files: [a.txt, b.txt]")
    )
    assert training.learning_rate == 1e-3
    assert model.top_k_tokens_per_head == [5, 3, 2]
    assert model.speculator is None
    assert data.data_files == ["a.txt", "b.txt"]


def test_every_kind_of_value(recipe):
    text = 'lr_scheduler_kwargs: {"min_lr": 1e-5}\nparabolic_schedule: false\nrun_name: -5\nspeculator: here'
    model, _, training = parse_recipe(recipe(text) + ["--speculator", "null"])
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert training.run_name == "-5"
    assert model.speculator is None
    assert parse_recipe([f"--config={recipe('n_predict: 4')[1]}"])[0].n_predict == 4


def test_a_flag_wins_over_the_file(recipe):
    args = recipe("max_steps: 5\nn_predict: 3") + ["--max_steps", "7", "--n_predict=4"]
    model, _, training = parse_recipe(args)
    assert (training.max_steps, model.n_predict) == (7, 4)


@pytest.mark.parametrize(
    ("text", "flags", "complaint"),
    [
        ("learnig_rate: 1e-3", [], "Unknown key 'learnig_rate' in .*Did you mean 'learning_rate'"),
        ("", ["--learnig_rate", "1"], "Unknown key 'learnig_rate' in the command line"),
        ("", ["--learning_r", "1"], "Unknown key"),
        ("", ["--max_steps=5", "stray"], "without a key.*stray"),
        ("max_steps: many", [], "max_steps.*invalid int"),
        ("max_steps: 1\nmax_steps: 2", [], "twice.*max_steps"),
        ("", ["--config"], "needs the path"),
        ("text_column: {a: b}", [], "`text_column` takes one value"),
        ("report_to: [wandb, tensorboard]", [], "`report_to` takes one value"),
        ("top_k_tokens_per_head: [[5, 3]]", [], "`top_k_tokens_per_head` takes a flat list"),
        ("stage: 4", [], "`stage` must be 1"),
    ],
)
def test_a_typo_stops_the_run(recipe, text, flags, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_recipe((recipe(text) if "--config" not in flags else []) + flags)


def test_a_recipe_that_does_not_exist():
    with pytest.raises(ValueError, match="nowhere.yaml`: there is no such file"):
        parse_recipe(["--config", "nowhere.yaml"])
