"""Recipes: what a YAML and a command line may say, and the texts that they name."""

from pathlib import Path

import datasets
import pytest
from tiny_models import word_tokenizer

from modeling_speculator.trainers import load_texts, pack, parse_recipe, split


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


@pytest.fixture
def tokenizer():
    return word_tokenizer([*map(str, range(100)), "</s>"], eos_token="</s>")


def test_pack_joins_texts_with_the_end_token(tokenizer):
    texts = datasets.Dataset.from_dict({"body": ["1 2 3", "4 5 6 7", "8"]})
    rows = pack(texts, tokenizer, sequence_length=4, text_column="body")
    assert rows["input_ids"][:] == [[1, 2, 3, 100], [4, 5, 6, 7]]
    assert rows.column_names == ["input_ids"]


def test_texts_too_short_for_a_sequence(tokenizer):
    texts = datasets.Dataset.from_dict({"text": ["1 2 3"]})
    with pytest.raises(ValueError, match="fewer tokens than one sequence of 64.*sequence_length"):
        pack(texts, tokenizer, sequence_length=64)
    with pytest.raises(ValueError, match="no column 'body'.*text_column"):
        pack(texts, tokenizer, sequence_length=2, text_column="body")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_load_files(tmp_path, suffix):
    texts = ["a text\nof two lines", "another"]
    data = datasets.Dataset.from_dict({"text": texts})
    files = [str(tmp_path / f"0.{suffix}")]
    if suffix == "txt":
        files.append(str(tmp_path / "1.txt"))
        for name, text in zip(files, texts, strict=True):
            Path(name).write_text(text)
    elif suffix == "jsonl":
        data.to_json(files[0])
    else:
        data.to_parquet(files[0])
    assert load_texts(data_files=files)["text"][:] == texts


def test_sources_that_are_wrong(tmp_path):
    with pytest.raises(ValueError, match="one of both"):
        load_texts()
    with pytest.raises(ValueError, match="don't exist.*nowhere.txt"):
        load_texts(data_files=[str(tmp_path / "nowhere.txt")])
    (tmp_path / "a.docx").touch()
    with pytest.raises(ValueError, match="of one kind"):
        load_texts(data_files=[str(tmp_path / "a.docx")])


def test_split_holds_out_the_last_rows():
    rows = datasets.Dataset.from_dict({"input_ids": [[n] for n in range(10)]})
    train, validation = split(rows, 0.2)
    assert train["input_ids"][:] == [[n] for n in range(8)]
    assert validation["input_ids"][:] == [[8], [9]]
    assert split(rows, 0)[1] is None
    with pytest.raises(ValueError, match="nothing to train on"):
        split(rows, 1.0)
