"""Hydra heads and ReDrafter's cell: by hand, in the loop, trained, saved."""

import pytest
import torch
from tiny_models import VOCAB, prompts, tiny_model
from torch.nn import functional as F
from trainings import arguments, rows
from transformers import AutoModel, CompileConfig

from modeling_speculator.measuring.acceptance import measure_acceptance
from modeling_speculator.modeling_hydra import HydraConfig, HydraModel
from modeling_speculator.modeling_redrafter import ReDrafterConfig, ReDrafterModel
from modeling_speculator.trainers import ModelArguments, SpeculatorTrainer, load_or_create_speculator


GREEDY = {"do_sample": False, "max_new_tokens": 24}
SHAPE = {"vocab_size": VOCAB, "emb_dim": 32, "n_predict": 3}


def hydra(base_model, n_blocks=2, **config):
    return _far_from_its_start(base_model, HydraModel(HydraConfig(**SHAPE | config, n_blocks=n_blocks)))


def redrafter(base_model, n_blocks=2, **config):
    return _far_from_its_start(base_model, ReDrafterModel(ReDrafterConfig(**SHAPE | config, n_blocks=n_blocks)))


def _far_from_its_start(base_model, speculator):
    torch.manual_seed(0)
    speculator.eval().speculator.start_from(base_model)
    with torch.no_grad():
        for weight in speculator.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return speculator


MAKERS = [hydra, redrafter]


@torch.no_grad()
def test_hydra_by_hand(llama):
    speculator = hydra(llama)
    cell, states, ids = speculator.speculator, torch.randn(2, 5, 32), torch.randint(VOCAB, (2, 7))
    logits, embed = speculator(states, ids, base_model=llama).logits, llama.get_input_embeddings()
    for head in range(3):
        x = torch.cat([states, *(embed(ids[:, i : i + 5]) for i in range(head + 1))], dim=-1)
        first, second = cell.blocks[head]
        x = x @ first.skip.weight.T + F.silu(x @ first.linear.weight.T + first.linear.bias)
        x = x + F.silu(x @ second.linear.weight.T + second.linear.bias)
        torch.testing.assert_close(logits[head], x @ cell.head[head].weight.T)


@torch.no_grad()
def test_redrafter_by_hand(llama):
    speculator = redrafter(llama)
    cell, states, ids = speculator.speculator, torch.randn(2, 5, 32), torch.randint(VOCAB, (2, 7))
    logits, s = speculator(states, ids, base_model=llama).logits, torch.zeros(2, 5, 32)
    for head in range(3):
        e = llama.get_input_embeddings()(ids[:, head : head + 5])
        s = F.silu(s @ cell.proj_state.weight.T + e @ cell.proj_token.weight.T + cell.proj_token.bias)
        x = torch.cat([states, s], dim=-1)
        for block in cell.blocks:
            x = x + F.silu(x @ block.weight.T + block.bias)
        torch.testing.assert_close(logits[head], x @ cell.head[0].weight.T)


@pytest.mark.parametrize("method", ["hydra", "redrafter"])
def test_a_new_one_says_what_the_base_model_says(llama, method):
    """Of the token after the context vector, whatever was drafted: as Medusa's heads start."""
    speculator = load_or_create_speculator(ModelArguments(base_model="here", method=method, n_predict=3), llama)
    states, ids = torch.randn(2, 5, 32), torch.randint(VOCAB, (2, 7))
    for logits in speculator(states, ids, base_model=llama).logits:
        torch.testing.assert_close(logits, llama.get_output_embeddings()(states))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dials", [{}, {"n_tree_nodes": 6}, {"n_lookup_tokens": 4}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt_bigcode", "gemma3_text"])
def test_in_the_loop(family, make, dials):
    model = tiny_model(family)
    speculator = make(model, **dials)
    expected = model.generate(**prompts(), **GREEDY)
    assert model.generate(**prompts(), **GREEDY, assistant_model=speculator).tolist() == expected.tolist()
    for record in measure_acceptance(model, speculator, **prompts(), **GREEDY):
        assert record.emitted_per_step == record.simulated_per_step


@pytest.mark.parametrize("make", MAKERS)
def test_compiled(llama, make):
    options = GREEDY | {"cache_implementation": "static", "compile_config": CompileConfig()}
    expected = llama.generate(**prompts(2), **GREEDY)
    assert llama.generate(**prompts(2), **options, assistant_model=make(llama)).tolist() == expected.tolist()


@pytest.mark.parametrize("make", MAKERS)
def test_saved_and_resized(llama, tmp_path, make):
    speculator = make(llama)
    speculator.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    weights = loaded.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in speculator.state_dict().items())
    loaded.resize_token_embeddings(VOCAB + 8)
    assert llama.generate(**prompts(), **GREEDY, assistant_model=loaded).shape == (3, 33)


@pytest.mark.parametrize("method", ["hydra", "redrafter"])
def test_trained(llama, tmp_path, method):
    model = load_or_create_speculator(ModelArguments(base_model="here", method=method, n_predict=3), llama)
    data, args = rows(4, 24), arguments(tmp_path, max_steps=40, learning_rate=1e-2, save_strategy="no")
    trainer = SpeculatorTrainer(model, llama, args, train_dataset=data, eval_dataset=data)
    untrained = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < untrained - 0.5
    assert all(weight.grad is None for weight in llama.parameters())


def test_bad_configs():
    for config_class in (HydraConfig, ReDrafterConfig):
        with pytest.raises(ValueError, match="drop `inner_dim`"):
            config_class(**SHAPE, inner_dim=7)
        with pytest.raises(ValueError, match="`n_blocks` must be an integer"):
            config_class(**SHAPE, n_blocks=-1)
    with pytest.raises(ValueError, match="can't be split into 5 heads"):
        HydraConfig(**SHAPE, context_heads=5)
