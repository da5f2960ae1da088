"""Models and data count by what they hold, not by where they lie or what they are called."""

import json
import shutil
import types

import datasets
import pytest
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, tiny_model, word_tokenizer

from modeling_speculator.trainers import contents
from modeling_speculator.trainers.provenance import commit_in, revision_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("llama").save_pretrained(folder / "model")
    word_tokenizer([f"w{n}" for n in range(VOCAB)]).save_pretrained(folder / "model")
    lora = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.peft_config["default"].base_model_name_or_path = str(folder / "model")
    lora.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def model(saved, tmp_path):
    return shutil.copytree(saved / "model", tmp_path / "copy")


def change_a_byte(path, at=-1):
    found = bytearray(path.read_bytes())
    found[at] ^= 1
    path.write_bytes(found)


def rewrite(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CHANGES = {
    "a weight's last bit": lambda folder: change_a_byte(folder / "model.safetensors"),
    "a weight in the middle": lambda folder: change_a_byte(folder / "model.safetensors", at=20_000),
    "the config": lambda folder: rewrite(folder / "config.json", rms_norm_eps=0.1),
    "the end of text": lambda folder: rewrite(folder / "generation_config.json", eos_token_id=3),
    "the tokenizer": lambda folder: change_a_byte(folder / "tokenizer.json"),
    "the chat template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    "its code": lambda folder: (folder / "modeling_own.py").write_text("pass"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_model_is_another(saved, model, change):
    known = contents.of_model(str(saved / "model"))
    assert contents.of_model(str(model)) == known
    change(model)
    assert contents.of_model(str(model)) != known


def test_what_lies_beside_a_model_does_not_count(saved, model):
    known = contents.of_model(str(model))
    (model / "checkpoint-2").mkdir()
    for name in (
        "trainer_state.json",
        "training_args.bin",
        "README.md",
        "acceptance.json",
        "checkpoint-2/config.json",
    ):
        (model / name).write_text("{}")
    rewrite(model / "config.json", transformers_version="9.9", _name_or_path="/elsewhere")
    assert contents.of_model(str(model)) == known


def test_an_adapter_is_it_and_its_model(saved, tmp_path):
    known = contents.of_model(str(saved / "adapter"))
    moved = shutil.copytree(saved, tmp_path / "moved")
    rewrite(moved / "adapter/adapter_config.json", base_model_name_or_path=str(moved / "model"))
    assert contents.of_model(str(moved / "adapter")) == known
    change_a_byte(moved / "model/model.safetensors")
    assert contents.of_model(str(moved / "adapter")) != known
    change_a_byte(moved / "model/model.safetensors")
    change_a_byte(moved / "adapter/adapter_model.safetensors")
    assert contents.of_model(str(moved / "adapter")) != known


def test_files_count_by_their_order_and_kind(tmp_path):
    for name, text in (("a.txt", "one"), ("b.txt", "two")):
        (tmp_path / name).write_text(text)
    known = contents.of_files([f"{tmp_path}/*.txt"])
    assert contents.of_files([f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"]) == known
    assert contents.of_files([f"{tmp_path}/b.txt", f"{tmp_path}/a.txt"]) != known
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    assert contents.of_files([f"{tmp_path}/*.txt"]) == known
    (tmp_path / "c.txt").rename(tmp_path / "c.jsonl")  # which is read otherwise
    assert contents.of_files([f"{tmp_path}/[ac].*"]) != known
    (tmp_path / "a.txt").write_text("0ne")
    (tmp_path / "c.jsonl").rename(tmp_path / "b.txt")
    assert contents.of_files([f"{tmp_path}/*.txt"]) != known


def test_a_folder_of_data_counts_by_its_files(tmp_path):
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "data")
    known = contents.of_dataset(str(tmp_path / "data"))
    moved = shutil.copytree(tmp_path / "data", tmp_path / "moved")
    (moved / "cache-0123.arrow").write_text("of a map")
    (moved / ".DS_Store").write_text("")
    assert contents.of_dataset(str(moved)) == known
    change_a_byte(next(moved.glob("data-*.arrow")))
    assert contents.of_dataset(str(moved)) != known


def test_a_dataset_of_the_hub_counts_by_its_commit(monkeypatch):
    def builder(name, config, revision):
        return types.SimpleNamespace(hash={"main": "c0ffee", "v1": "c0ffee", "v2": "decade"}[revision or "main"])

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    main, same, other = (contents.of_dataset("org/data", None, revision) for revision in (None, "v1", "v2"))
    assert main == same == "commit:c0ffee" and other == "commit:decade"


def test_a_model_of_the_hub_counts_by_its_commit(hub, client, saved, tmp_path):
    client.run(
        "from huggingface_hub import HfApi; HfApi().create_repo('org/model')\n"
        f"HfApi().upload_folder(repo_id='org/model', folder_path={str(saved / 'model')!r})"
    )
    of_model = "from modeling_speculator.trainers.contents import of_model\nresult = of_model('org/model')"
    before = client.run(of_model)
    assert before == f"commit:{hub.repositories['org/model'].branches['main']}"
    (tmp_path / "notes.txt").write_text("a later commit")
    client.run(
        "from huggingface_hub import HfApi\n"
        f"HfApi().upload_file(path_or_fileobj={str(tmp_path / 'notes.txt')!r}, path_in_repo='n', repo_id='org/model')"
    )
    assert client.run(of_model) == f"commit:{hub.repositories['org/model'].branches['main']}" != before


def test_a_commit_is_read_from_paths_of_the_cache_only(tmp_path):
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--org--model/snapshots" / commit
    snapshot.mkdir(parents=True)
    assert commit_in(snapshot / "config.json") == revision_of(str(snapshot)) == commit
    assert contents.of_model(str(snapshot)) == f"commit:{commit}"
    mine = tmp_path / "snapshots/second_try"
    mine.mkdir(parents=True)
    assert commit_in(mine) is None and contents.of_model(str(mine)).startswith("sha256:")


def test_long_reading_is_announced(saved, monkeypatch, capsys):
    monkeypatch.setattr(contents, "_SAID_FROM", 1000)
    contents.of_model(str(saved / "model"))
    assert f"Reading {saved / 'model'} (0 GB)" in capsys.readouterr().out
