"""Names that are no model, or not such a model: one sentence each, for commands and for who imports the loaders."""

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, character_tokenizer, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, ViTConfig

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel, load_speculator_and_base
from modeling_speculator.loading import (
    base_model_config,
    load_base_model,
    load_drafter,
    load_speculator,
    speculator_config,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of every kind, and what only looks like one."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("base", "without_tokenizer", "cut", "broken"):
        tiny_model("llama").save_pretrained(folder / name)
    for name in ("base", "cut", "broken"):
        character_tokenizer(eos_token="z").save_pretrained(folder / name)
    weights = folder / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "broken/config.json").write_text("{")
    for name in ("speculator", "cut_speculator"):
        config = MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=32)
        MLPSpeculatorPreTrainedModel(config).save_pretrained(folder / name)
    weights = folder / "cut_speculator/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    ViTConfig().save_pretrained(folder / "of_images")
    (folder / "nothing").mkdir()
    (folder / "unfinished/checkpoint-5").mkdir(parents=True)
    return folder


def message(load, *args) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        load(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


NOWHERE = {
    "outputs/nowhere/base": "no folder 'outputs/nowhere/base' here, and it is no name that a model of the Hub could",
    "outputs/nowhere": "no folder 'outputs/nowhere' here, and the Hub, where it may be, can't be reached",
}
IN_FOLDERS = {
    "nothing": "holds no model (no config.json)",
    "unfinished": "Its training has not ended: start it again",
    "broken": "is not a valid JSON file",
}


@pytest.mark.parametrize("name", [*NOWHERE, *IN_FOLDERS])
def test_names_of_nothing(name, folder, llama):
    expected = NOWHERE.get(name) or IN_FOLDERS[name]
    name = name if name in NOWHERE else str(folder / name)
    for load in (load_base_model, base_model_config, speculator_config, load_speculator_and_base):
        assert expected in message(load, name)
    for load in (load_speculator, load_drafter):
        assert expected in message(load, name, llama)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("speculator", "is a speculator, not a base model"),
        ("of_images", "is a model of type 'vit', none that continues text"),
        ("without_tokenizer", "holds no tokenizer"),
    ],
)
def test_what_is_no_base_model(folder, name, complaint):
    assert f"{folder / name} {complaint}" in message(load_base_model, str(folder / name))


def test_damaged_weights(folder, llama):
    complaint = "can't be read (Error while deserializing"
    assert f"The weights of {folder / 'cut'} {complaint}" in message(load_base_model, str(folder / "cut"))
    speculator = folder / "cut_speculator"
    assert f"The weights of {speculator} {complaint}" in message(load_speculator, str(speculator), llama)


def test_what_is_no_speculator(folder, llama):
    for name, kind in (("base", "llama"), ("adapter", "llama"), ("of_images", "vit")):
        expected = f"{folder / name} is a model of type '{kind}', no speculator."
        assert message(load_speculator, str(folder / name), llama) == expected
        assert message(load_speculator_and_base, str(folder / name)) == expected
    assert "none that continues text" in message(load_drafter, str(folder / "of_images"), llama)


def test_what_may_draft(folder, llama):
    """A language model does in transformers' own way, where that is what is asked for."""
    assert load_drafter(str(folder / "base"), llama).config.model_type == "llama"
    assert load_drafter(str(folder / "adapter"), llama).config.model_type == "llama"
    drafter = load_speculator(str(folder / "speculator"), llama.to(torch.float32))
    assert (drafter.dtype, drafter.training) == (torch.float32, False)


@pytest.mark.parametrize("dtype", ["float31", "int8", "Tensor"])
def test_dtypes(folder, dtype):
    assert f"not {dtype!r}" in message(load_base_model, str(folder / "base"), dtype)


def test_an_adapter_of_nothing(tmp_path):
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "is an adapter that does not say for which model" in message(base_model_config, str(tmp_path))


def test_a_gated_model(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("You are trying to access\na gated repo.") from GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    assert "on the Hub it is gated: ask for access" in message(base_model_config, "org/gated")


PUSH = """
from huggingface_hub import HfApi
for name in ("base", "adapter"):
    HfApi().create_repo(f"org/{name}")
    HfApi().upload_folder(repo_id=f"org/{name}", folder_path=f"{FOLDER}/{name}")
"""
LOOK = """
import modeling_speculator
from modeling_speculator.loading import base_model_config
try:
    result = base_model_config(*ARGS).model_type
except ValueError as error:
    result = str(error)
"""


def test_names_on_the_hub(client, folder):
    client.run(f"FOLDER = {str(folder)!r}" + PUSH)

    def look(*args):
        return client.run(f"ARGS = {args!r}" + LOOK)

    assert look("org/base") == look("org/adapter") == "llama"
    assert "'org/base' here, and the model of that name on the Hub has no such revision" in look("org/base", "v9")
    assert "'org/nowhere' here, and the Hub has no such model that you may see" in look("org/nowhere")
