"""Checkpoints as others write them, and ours as others read them."""

import json
import math
from functools import partial
from pathlib import Path

import commands
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from modeling_speculator import MedusaConfig, MedusaModel, MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.formats import ARCTIC_LSTM, ARCTIC_MLP, save_arctic
from modeling_speculator.model_cards.provenance_file import is_about, read_provenance, weights_in, write_provenance


RECIPE = Path(__file__).parents[1] / "recipes/convert.py"
SHAPE = {"vocab_size": 40, "emb_dim": 24, "inner_dim": 16}
KINDS = {
    "untied": {},
    "tied": {"tie_weights": True},
    "scaled": {"tie_weights": True, "scale_input": True, "n_predict": 4},
    "gated": {"tie_weights": True, "method": "sum_lstm"},
}


def speculator_of(kind, **options):
    torch.manual_seed(0)
    return MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(**SHAPE, **KINDS[kind], **options)).eval()


def write(folder, config, weights, binary=True):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if binary:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file({key: tensor.clone() for key, tensor in weights.items()}, folder / "model.safetensors")


def logits_of(model):
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(2, 3, model.config.emb_dim, generator=generator)
    tokens = torch.randint(model.config.vocab_size, (2, 2 + model.config.n_predict), generator=generator)
    return model(states, tokens).logits


def lstm_config(**options):
    """As ArcticTraining writes it: a bare string for a class, strings for widths, draft tokens for candidates."""
    config = {"architectures": ARCTIC_LSTM, "model_type": "mlp_speculator", "method": "sum_lstm", "n_predict": 3}
    config |= {"input_hidden_dim": 24, "emb_dim": "16", "proj_dim": "16", "inner_dim": "16", "vocab_size": 40}
    config |= {"tie_weights": True, "tie_lstm_embs": True, "scale_input": False, "n_candidates": 3}
    return config | {"top_k_tokens_per_head": [1, 1, 1], "torch_dtype": "float32", **options}


def test_golden_vectors_of_an_arctic_checkpoint(shared, tmp_path):
    golden = json.loads((shared / "reference/golden.json").read_text())["arctic_lstm_like"]
    tensors = load_file(shared / "reference/arctic_lstm_like.safetensors")
    weights = {key[2:]: tensor for key, tensor in tensors.items() if key[:2] == "w."}
    weights |= {f"head.{head}.weight": weights["head.0.weight"] for head in (1, 2)}
    weights |= {f"{gate}_emb.0.weight": weights["forget_emb.0.weight"] for gate in ("input", "cell", "output")}
    more = {"architectures": ARCTIC_LSTM, "model_type": "mlp_speculator", "n_candidates": 3}
    write(tmp_path, golden["config"] | more | {"top_k_tokens_per_head": [1, 1, 1]}, weights)
    model = AutoModel.from_pretrained(tmp_path)
    logits = model(tensors["in.state"], tensors["in.inds"]).logits
    torch.testing.assert_close(logits, tensors["out.forward"], atol=1e-4, rtol=0)
    drafts = model.generate_candidates(tensors["in.gen_state"], tensors["in.gen_ind"], golden["topk"], golden["n"])
    assert drafts.tolist() == tensors["out.suffixes"].tolist()
    assert model.generate_candidates(tensors["in.gen_state"], tensors["in.gen_ind"]).shape == (
        3,
        1,
        3,
    )  # its own chain


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("kind", ["untied", "tied", "gated"])
def test_without_the_prefix(kind, binary, tmp_path):
    """fms-extras' own names."""
    model = speculator_of(kind)
    weights = {key.removeprefix("speculator."): tensor for key, tensor in model.state_dict().items()}
    write(tmp_path, model.config.to_diff_dict(), weights, binary)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    loaded.save_pretrained(tmp_path / "again")  # ... and from there on under the published ones
    saved = load_file(tmp_path / "again/model.safetensors")
    assert saved and all(key.startswith("speculator.") for key in saved)


def test_arctics_first_class(tmp_path):
    """The published names, a bare string, a misspelt key, as many candidates as heads."""
    model = speculator_of("untied")
    config = {key: value for key, value in model.config.to_diff_dict().items() if key != "top_k_tokens_per_head"}
    config |= {"architectures": "MLPSpeculatorPreTrainedModel", "top_k_tokesns_per_head": [1, 1, 1], "n_candidates": 3}
    write(tmp_path, config | {"torch_dtype": "bfloat16"}, model.state_dict())
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.config.architectures == ["MLPSpeculatorPreTrainedModel"]
    assert (loaded.config.top_k_tokens_per_head, loaded.config.n_candidates) == ([1, 1, 1], 1)


def test_arctics_second_class_without_gates(tmp_path):
    """Its layers are Sequentials."""
    model = speculator_of("tied")
    weights = {}
    for key, tensor in model.state_dict().items():
        name, number, last = key.removeprefix("speculator.").split(".")
        if name == "head":
            weights[f"head.{number}.{last}"] = tensor
        elif int(number) <= (name == "proj"):
            weights[f"{name}.{number}.0.{last}"] = tensor
    write(tmp_path, lstm_config(method="sum_rnn", tie_lstm_embs=False), weights)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    loaded.save_pretrained(tmp_path / "again")
    assert "speculator.emb.0.weight" in load_file(tmp_path / "again/model.safetensors")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"emb_dim": "16.16"}, "several layers or widths"),
        ({"proj_dim": "12"}, "several layers or widths"),
        ({"tie_lstm_embs": False}, "an embedding for each gate"),
        ({"inner_dim": "16.16", "emb_dim": "16.16", "proj_dim": "16.16"}, "several layers or widths"),
    ],
)
def test_what_is_not_supported(options, complaint, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(lstm_config(**options)))
    with pytest.raises(ValueError, match=complaint):
        AutoConfig.from_pretrained(tmp_path)


def arctic_logits(folder):
    """What Arctic Inference computes of a folder: `logits_of`, by an implementation of its own."""
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    weights = {key.replace("speculator.", ""): tensor for key, tensor in weights.items()}
    (name,), tied, n_predict = config["architectures"], config["tie_weights"], config["n_predict"]
    gated = name == ARCTIC_LSTM
    base = config["input_hidden_dim"] if gated else config["emb_dim"]
    (inner,) = [int(part) for part in str(config["inner_dim"]).split(".")]
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(2, 3, base, generator=generator)
    tokens = torch.randint(config["vocab_size"], (2, 2 + n_predict), generator=generator)
    if gated:
        assert config["tie_lstm_embs"] and tied
        for gate in ("input", "cell", "output"):
            assert torch.equal(weights.pop(f"{gate}_emb.0.weight"), weights["forget_emb.0.weight"])
        order = ("forget", "input", "output", "cell")
        projs = [torch.cat([weights.pop(f"{gate}_proj.{at}.weight") for gate in order]) for at in (0, 1)]

    def norm(x, prefix):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x if prefix is None else weights[f"{prefix}.weight"] * x + weights[f"{prefix}.bias"]

    state_weight = 0.5 ** (0.5 / n_predict)
    alpha = math.sqrt((1 - state_weight**2) * inner / 2) / state_weight
    logits, cells = [], torch.zeros(2, 3, inner)
    if config["scale_input"]:
        state = norm(state, None) / 2**0.5
    for head in range(n_predict):
        at, proj, read = 0 if tied else head, min(head, 1) if tied else head, tokens[:, head : head + 3]
        if gated:
            added = F.linear(state, projs[proj]) + alpha * F.embedding(read, weights["forget_emb.0.weight"]).repeat(
                1, 1, 4
            )
            forget, input_, output, cell = added.chunk(4, dim=-1)
            cells = cells * forget.sigmoid() + F.gelu(norm(cell, "cell_ln.0")) * input_.sigmoid()
            state = F.gelu(norm(cells, "state_ln.0")) * output.sigmoid()
        else:
            z = F.embedding(read, weights[f"emb.{at}.weight"])
            state = F.gelu(norm(F.linear(state, weights[f"proj.{proj}.weight"]) + alpha * z, f"ln.{at}"))
        logits.append(F.linear(state, weights[f"head.{at}.weight"]))
    return torch.stack(logits)


@pytest.mark.parametrize("kind", KINDS)
def test_what_arctic_inference_reads_of_ours(kind, tmp_path):
    model = speculator_of(kind, n_candidates=4)
    save_arctic(model, tmp_path / "arctic", ["LlamaForCausalLM"])
    config = json.loads((tmp_path / "arctic/config.json").read_text())
    assert config["architectures"] == [ARCTIC_LSTM if kind == "gated" else ARCTIC_MLP]
    assert config["base_model_archs"] == ["LlamaForCausalLM"] and config["model_type"] == "mlp_speculator"
    torch.testing.assert_close(arctic_logits(tmp_path / "arctic"), logits_of(model))
    # And back again.
    loaded = AutoModel.from_pretrained(tmp_path / "arctic")
    loaded.config.auto_map = {"AutoModel": "code.of_the_repository_that_it_came_from"}
    loaded.save_pretrained(tmp_path / "published")
    model.save_pretrained(tmp_path / "ours")
    back, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("published", "ours"))
    assert back.keys() == ours.keys() and all(torch.equal(back[key], ours[key]) for key in ours)
    back, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("published", "ours"))
    assert back.pop("base_model_archs") == ["LlamaForCausalLM"]
    assert back == ours


def test_what_has_no_such_form(tmp_path):
    with pytest.raises(ValueError, match="not 'medusa'"):
        save_arctic(MedusaModel(MedusaConfig(vocab_size=40, emb_dim=24)), tmp_path, ["LlamaForCausalLM"])
    with pytest.raises(ValueError, match="one head with `tie_weights`"):
        save_arctic(speculator_of("tied", n_predict=1), tmp_path, ["LlamaForCausalLM"])
    assert not any(tmp_path.iterdir())


def test_the_command(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base_model")
    model = speculator_of("gated", base_model_name_or_path=str(tmp_path / "base_model"))
    model.save_pretrained(tmp_path / "ours")
    write_provenance(tmp_path / "ours", {"steps": 3})

    run = partial(commands.run, RECIPE)
    done = run("--speculator", tmp_path / "ours", "--to", "arctic", "--output", tmp_path / "arctic")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    assert json.loads((tmp_path / "arctic/config.json").read_text())["base_model_archs"] == ["LlamaForCausalLM"]
    done = run("--speculator", tmp_path / "arctic", "--to", "mlp_speculator", "--output", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert torch.equal(logits_of(AutoModel.from_pretrained(tmp_path / "back")), logits_of(model))
    known = read_provenance(tmp_path / "back")
    assert known["steps"] == 3 and is_about(known, weights_in(tmp_path / "back"))
    again = run("--speculator", tmp_path / "arctic", "--to", "mlp_speculator", "--output", tmp_path / "back")
    assert "is not empty" in again.stderr
    speculator_of("untied").save_pretrained(tmp_path / "nameless")
    nameless = run("--speculator", tmp_path / "nameless", "--to", "arctic", "--output", tmp_path / "other")
    assert "give --base_model_archs" in nameless.stderr
