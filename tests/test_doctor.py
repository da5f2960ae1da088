"""The command that says whether all is as expected, on models that are and that are not."""

import sys

import pytest
import torch
from test_chains import hybrid
from tiny_models import VOCAB, character_tokenizer, tiny_model
from transformers import GenerationMixin, GPTNeoConfig, GPTNeoForCausalLM

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel, doctor
from modeling_speculator.doctor import examine
from modeling_speculator.families import FAMILIES, NOT_SERVED
from modeling_speculator.family_proof import compare_tree


TOKENIZER = character_tokenizer(eos_token="z")


def examined(model, capsys, speculator=None) -> tuple[bool, str]:
    is_well = examine(model, TOKENIZER, speculator)
    return is_well, capsys.readouterr().out


def test_a_model_as_it_should_be(llama, capsys):
    is_well, out = examined(llama, capsys)
    assert is_well
    assert "Another token is the most probable at 0 of 20 nodes" in out
    assert "the same with a speculator: 4 of 4" in out
    tokens_per_step = float(out.split("(")[-1].split()[0])
    assert tokens_per_step > 2  # so that the comparison means something


def test_with_a_speculator(llama, capsys):
    torch.manual_seed(0)
    speculator = MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=32))
    is_well, out = examined(llama, capsys, speculator)
    assert is_well and "with the speculator's drafts" in out


def hooked(what, model=None):
    """A model whose decoder does something to what it returns."""
    model = tiny_model("llama") if model is None else model

    def hook(module, args, output):
        output.last_hidden_state = what(output.last_hidden_state)
        return output

    model.get_decoder().register_forward_hook(hook)
    return model


def steer_the_last(states):
    states = states.clone()
    states[:, -1] += 3 * states[:, -1].roll(1, dims=-1)
    return states


def scale_by_all(states):
    return states * (1 + states.abs().amax(dim=(1, 2), keepdim=True)).log2() ** 3 - states.mean(1, keepdim=True)


@pytest.mark.parametrize("what", [steer_the_last, scale_by_all])
def test_a_forward_that_is_no_function_of_each_token(what, capsys):
    is_well, out = examined(hooked(what), capsys)
    assert not is_well
    assert "which is no rounding" in out and "an adapter, a hook" in out


def test_a_hook_that_treats_all_tokens_alike_is_fine(capsys):
    is_well, _ = examined(hooked(lambda states: states + 3 * states.roll(1, dims=-1)), capsys)
    assert is_well


def test_the_tree_is_compared_with_plain_decoding(llama):
    report = compare_tree(llama, torch.tensor([[1, 2, 3, 4]]))
    assert report.nodes == 20 and report.other_choices == 0 and report.margin == 0
    assert 0 < report.difference < 1e-4 < report.largest


def run(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["doctor", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    return int(ended.value.code), capsys.readouterr().out


def test_the_machine_and_the_libraries(monkeypatch, capsys):
    status, out = run(monkeypatch, capsys)
    assert status == 0
    for text in ("transformers 5.", "_prefill: as expected", "GFLOP/s: float32", "C++ compiler", "All is well."):
        assert text in out


def test_a_name_that_is_gone(monkeypatch, capsys):
    monkeypatch.delattr(GenerationMixin, "_prefill")
    status, out = run(monkeypatch, capsys)
    assert status == 1
    assert "_prefill is not there" in out and "Not all is well" in out


def test_a_folder(monkeypatch, capsys, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    status, out = run(monkeypatch, capsys, "--base_model", tmp_path)
    assert status == 0 and "GPT2LMHeadModel (gpt2), float32, sdpa attention, on cpu" in out


def test_a_model_that_speculation_refuses(monkeypatch, capsys, tmp_path):
    model = tiny_model("llama")
    model.config.rope_parameters |= {"rope_type": "dynamic", "factor": 2.0}
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    status, out = run(monkeypatch, capsys, "--base_model", tmp_path)
    assert status == 1 and "rope_type='dynamic'" in out


def test_a_folder_that_is_not_there(monkeypatch, capsys, tmp_path):
    status, out = run(monkeypatch, capsys, "--base_model", tmp_path / "nothing")
    assert status == 1 and "nothing" in out


UNKNOWN = {"llama": "one", "mistral": "window", "qwen3": "layer types", "gpt2": "one", "olmo3": "layer types"}


@pytest.mark.parametrize("family", UNKNOWN)
def test_a_family_that_is_not_in_the_table(family, capsys, monkeypatch):
    """Its line is found, whatever window it has, and it is served with that."""
    model = tiny_model(family)
    monkeypatch.delitem(FAMILIES, family)
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = 4096
    is_well, out = examined(model, capsys)
    assert is_well and f"modeling_speculator.register_family({family!r}, {UNKNOWN[family]!r})" in out
    assert "the same with a speculator: 4 of 4" in out
    assert getattr(model.config, "sliding_window", None) in (None, 4096)


def test_a_family_that_can_not_be_served(capsys, monkeypatch):
    """A window of its own that the config does not tell of."""
    model = tiny_model("mistral")
    monkeypatch.delitem(FAMILIES, "mistral")
    is_well, out = examined(hooked(scale_by_all, model), capsys)
    assert not is_well and "it can't be served" in out and "mistral" not in FAMILIES
    assert "masks 'window': logits differ by up to" in out and "masks 'one': logits differ by" in out


def test_a_family_whose_texts_part(capsys, monkeypatch):
    """GPT-Neo masks keys by their order in the cache: a first tree after a short prompt does not show it."""
    monkeypatch.delitem(NOT_SERVED, "gpt_neo")
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 256}
    config = GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], window_size=256, intermediate_size=48)
    model = GPTNeoForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
    model.generation_config.eos_token_id = None
    is_well, out = examined(model, capsys)
    assert not is_well and "register_family" not in out and "gpt_neo" not in FAMILIES


def test_a_model_that_verifies_chains(capsys):
    is_well, out = examined(hybrid("qwen3_next"), capsys)
    assert is_well and "verifies chains" in out and "the same with a speculator: 4 of 4" in out
