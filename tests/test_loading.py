"""Both models by one name, the hook for the time of a call, and a speculator beside another base model."""

import importlib.util
import threading
from types import SimpleNamespace

import pytest
import torch
from tiny_models import VOCAB, character_tokenizer, tiny_model
from transformers import GenerationMixin

from modeling_speculator import (
    MLPSpeculatorConfig,
    MLPSpeculatorPreTrainedModel,
    checks,
    generation,
    install_generation_hook,
    load_speculator_and_base,
    remove_generation_hook,
)
from modeling_speculator.generation import generation_hook


def speculator(**options):
    torch.manual_seed(0)
    return MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=32, **options)).eval()


def test_both_from_folders(tmp_path):
    base_model = tiny_model("llama")
    base_model.config.eos_token_id = 25
    base_model.save_pretrained(tmp_path / "base")
    character_tokenizer(eos_token="z").save_pretrained(tmp_path / "base")
    speculator(base_model_name_or_path=str(tmp_path / "base")).save_pretrained(tmp_path / "a")
    drafter, model, tokenizer = load_speculator_and_base(str(tmp_path / "a"), dtype="bfloat16")
    assert drafter.config.eos_token_id == 25  # which a text-generation pipeline compares
    assert drafter.dtype == model.dtype == torch.bfloat16 and drafter.device == model.device
    out = model.generate(**tokenizer("abc", return_tensors="pt"), assistant_model=drafter, max_new_tokens=5)
    assert out.shape[1] <= 8
    speculator().save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="does not say which base model"):
        load_speculator_and_base(str(tmp_path / "b"))


@pytest.fixture
def unhooked():
    remove_generation_hook()
    yield GenerationMixin._assisted_decoding
    install_generation_hook()


def test_the_hook_for_the_time_of_a_call(llama, unhooked):
    """Also where calls overlap, and in whatever order they end."""
    prompt = torch.tensor([[1, 2, 3]])
    plain = llama.generate(prompt, max_new_tokens=8, do_sample=False)
    both_in, first_out, texts = threading.Barrier(2), threading.Event(), {}

    def call(name):
        with generation_hook():
            both_in.wait(timeout=60)
            if name == "second":
                first_out.wait(timeout=60)
            texts[name] = llama.generate(prompt, assistant_model=speculator(), max_new_tokens=8, do_sample=False)
        first_out.set()

    threads = [threading.Thread(target=call, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert texts["first"].tolist() == texts["second"].tolist() == plain.tolist()
    assert GenerationMixin._assisted_decoding is unhooked


def test_the_hooks_of_two_copies_of_this_code(llama, unhooked):
    """As two repositories carry it: whichever ends first, the other and plain `generate` go on."""
    spec = importlib.util.spec_from_file_location("modeling_speculator.generation_copy", generation.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    prompt, options = torch.tensor([[1, 2, 3]]), {"max_new_tokens": 8, "do_sample": False}
    plain = llama.generate(prompt, **options).tolist()
    for _ in range(2):
        first, second = generation.generation_hook(), copy.generation_hook()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert llama.generate(prompt, **options, assistant_model=speculator()).tolist() == plain
        assert llama.generate(prompt, **options, prompt_lookup_num_tokens=2).tolist() == plain
        second.__exit__(None, None, None)
        assert llama.generate(prompt, **options).tolist() == plain
        assert llama.generate(prompt, **options, prompt_lookup_num_tokens=2).tolist() == plain
    remove_generation_hook()
    assert GenerationMixin._assisted_decoding is unhooked


def test_a_hook_that_is_there_for_good_stays():
    hooked = GenerationMixin._assisted_decoding
    with generation_hook():
        assert GenerationMixin._assisted_decoding is hooked
    assert GenerationMixin._assisted_decoding is hooked


@pytest.mark.parametrize(
    ("trained_for", "beside", "warns"),
    [
        ("org/name", "org/name", False),
        ("org/name", "ORG/Name", False),
        ("org/name", "other/name", True),
        ("org/name", "org/name-chat", True),
        ("org/name", "/models/name", False),
        ("org/name", "/models/another", True),
        ("org/name", "/cache/models--org--name/snapshots/c0ffee", False),
        ("org/name", "/cache/models--other--name/snapshots/c0ffee/", True),
        ("gpt2", "/cache/models--gpt2/snapshots/c0ffee", False),
        ("outputs/base/model", "elsewhere/model", False),
        (None, "org/name", False),
        ("org/name", "", False),
    ],
)
def test_another_base_model_of_the_same_shape(trained_for, beside, warns, llama, monkeypatch):
    said = []
    monkeypatch.setattr(checks, "logger", SimpleNamespace(warning_once=said.append))
    monkeypatch.setattr(llama.config, "_name_or_path", beside)
    drafter = speculator(base_model_name_or_path=trained_for)
    llama.generate(torch.tensor([[1, 2]]), assistant_model=drafter, max_new_tokens=3, do_sample=False)
    assert bool(said) == warns
    assert all(trained_for in text and beside in text for text in said)
