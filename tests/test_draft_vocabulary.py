"""Drafting from the most frequent tokens only: what is drafted changes, what is emitted never."""

import json
from pathlib import Path

import commands
import datasets
import pytest
import torch
from drafters import context_speculator, hydra_plus_speculator, streaming_speculator
from test_drafter_state import MAKERS
from test_residual import new
from tiny_models import VOCAB, prompts, tiny_model
from transformers import AutoModel, CompileConfig
from transformers.pytorch_utils import Conv1D

from modeling_speculator.base_model_ends import BaseModelEnds
from modeling_speculator.families import output_logits
from modeling_speculator.measuring.acceptance import measure_acceptance
from modeling_speculator.modeling_residual import ResidualConfig
from modeling_speculator.vocabularies import beside


RECIPE = Path(__file__).parents[1] / "recipes/draft_vocabulary.py"
IDS = [0, 3, 7, 8, 11, 20, 33, 40, 41, 59, 63]
GREEDY = {"do_sample": False, "max_new_tokens": 24}


@pytest.mark.parametrize("family", ["llama", "phi", "granite", "cohere", "gemma2", "gpt_bigcode"])
@torch.no_grad()
def test_the_rows_of_the_lm_head(family):
    """With its bias, and all that the family does to logits."""
    model = tiny_model(family)
    head = model.get_output_embeddings()
    if head.bias is not None:
        head.bias.normal_()
    ends, features = BaseModelEnds(model, VOCAB), torch.randn(2, 3, 32)
    found = ends.draft_logits(features, ends.draft_rows(IDS))
    torch.testing.assert_close(found, output_logits(model, features)[..., IDS])


@pytest.mark.parametrize("dials", [{}, {"n_tree_nodes": 6}, {"n_candidates": 2}], ids=str)
@pytest.mark.parametrize("make", [new, context_speculator, streaming_speculator])
def test_what_is_drafted_is_the_best_of_them(llama, make, dials):
    speculator = make(llama, **dials)
    width = 96 if make is streaming_speculator else 32
    states, roots = torch.randn(4, 1, width), torch.tensor([[1], [2], [3], [4]])
    drafter = beside(llama, speculator)
    best = drafter.score(states, roots.expand(-1, 3))[0, :, 0, IDS].topk(5).indices

    speculator.config.draft_vocabulary = IDS
    drafter = beside(llama, speculator)
    if speculator.config.n_tree_nodes is None:
        drafted = drafter.generate_candidates(states, roots)
        assert set(drafted[:, :, 0].flatten().tolist()) <= {IDS[at] for row in best.tolist() for at in row}
    else:
        drafted = drafter.generate_tree(states, roots)[0]
    assert set(drafted.flatten().tolist()) <= set(IDS)
    text = llama.generate(**prompts(), **GREEDY, assistant_model=speculator)
    assert text.tolist() == llama.generate(**prompts(), **GREEDY).tolist()


def test_all_tokens_are_as_none(llama):
    speculator = new(llama)
    states, roots = torch.randn(4, 1, 32), torch.tensor([[1], [2], [3], [4]])
    whole = beside(llama, speculator).generate_candidates(states, roots)
    speculator.config.draft_vocabulary = list(range(VOCAB))
    assert beside(llama, speculator).generate_candidates(states, roots).tolist() == whole.tolist()


@pytest.mark.parametrize("make", [new, *(make for make in MAKERS if make is not hydra_plus_speculator)])
def test_simulated_steps_are_the_loops(llama, make):
    speculator = make(llama, draft_vocabulary=IDS)
    for record in measure_acceptance(llama, speculator, **prompts(), **GREEDY):
        assert record.emitted_per_step == record.simulated_per_step


def test_a_compiled_step_is_compiled_once(llama):
    speculator = new(llama, draft_vocabulary=IDS)
    options = GREEDY | {"cache_implementation": "static", "compile_config": CompileConfig()}
    expected = llama.generate(**prompts(2), **GREEDY).tolist()
    assert llama.generate(**prompts(2), **options, assistant_model=speculator).tolist() == expected
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert llama.generate(**prompts(2), **options, assistant_model=speculator).tolist() == expected


def test_changed_weights_are_seen():
    model = tiny_model("llama")
    ends = BaseModelEnds(model, VOCAB)
    before = ends.draft_rows(IDS)
    assert ends.draft_rows(IDS) is before and ends.draft_rows(IDS[1:]) is not before
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1.0)
    torch.testing.assert_close(ends.draft_rows(IDS).weight, before.weight + 1.0)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = tiny_model("llama")
        speculator = new(model, draft_vocabulary=IDS)
        text = model.generate(**prompts(), **GREEDY, assistant_model=speculator)
        assert text.tolist() == model.generate(**prompts(), **GREEDY).tolist()


def test_tokens_that_the_base_model_lacks(llama):
    """Are not drafted; and what is left must be enough."""
    speculator = new(llama)
    speculator.resize_token_embeddings(VOCAB + 8)
    speculator.config.draft_vocabulary = [*IDS, 65, 70]
    rows = BaseModelEnds(llama, VOCAB + 8).draft_rows([*IDS, 65, 70])
    assert rows.ids.tolist() == IDS
    text = llama.generate(**prompts(), **GREEDY, assistant_model=speculator)
    assert text.tolist() == llama.generate(**prompts(), **GREEDY).tolist()
    with pytest.raises(ValueError, match="between 1 and the vocabulary's 3"):
        llama.generate(**prompts(), assistant_model=new(llama, draft_vocabulary=[1, 2, 3, 9, 11][:3]))


def test_saved_with_the_speculator(llama, tmp_path):
    new(llama, draft_vocabulary=IDS).save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.draft_vocabulary == IDS
    new(llama).save_pretrained(tmp_path)
    assert "draft_vocabulary" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("ids", [[], [3, 3], [4, 2], [-1, 5], [1.0, 2.0], [True, 2]], ids=str)
def test_bad_ids(llama, ids):
    with pytest.raises(ValueError, match="in ascending order, each of them once"):
        ResidualConfig(vocab_size=VOCAB, emb_dim=32, draft_vocabulary=ids)
    speculator = new(llama)
    speculator.config.draft_vocabulary = ids
    with pytest.raises(ValueError, match=r"in ascending order|between 1 and the vocabulary's \d"):
        llama.generate(**prompts(), assistant_model=speculator)


def test_an_id_that_is_too_large():
    with pytest.raises(ValueError, match="the id 64, but there are only 64"):
        ResidualConfig(vocab_size=VOCAB, emb_dim=32, draft_vocabulary=[1, 2, 3, 4, 5, 64])


def test_an_lm_head_without_rows_is_refused():
    model = tiny_model("llama")
    speculator = new(model, draft_vocabulary=IDS)
    model.set_output_embeddings(Conv1D(VOCAB, 32))
    with pytest.raises(ValueError, match="takes rows of the LM head.*Conv1D.*quantized"):
        model.generate(**prompts(), assistant_model=speculator)


def test_the_recipe(tmp_path, llama):
    """The most frequent tokens of texts, the end tokens among them."""
    folder = tmp_path / "base"
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [62, 61]
    model.save_pretrained(folder)
    new(model).save_pretrained(tmp_path / "speculator")
    # Of the second what comes after its end is padding, and does not count.
    texts = [[5] * 9 + [9] * 8 + [7] * 7, [3] * 6 + [1] * 5 + [2] * 4 + [30, 62] + [0] * 30]
    datasets.Dataset.from_dict({"input_ids": texts, "continuation": texts}).to_parquet(tmp_path / "texts.parquet")
    command = ["--speculator", tmp_path / "speculator", "--base_model", folder]
    command += ["--data_files", tmp_path / "texts.parquet", "--output", tmp_path / "out"]
    done = commands.run(RECIPE, *command, "--tokens", 7)
    assert done.returncode == 0, done.stderr
    assert AutoModel.from_pretrained(tmp_path / "out").config.draft_vocabulary == [1, 3, 5, 7, 9, 61, 62]
    assert "7 of 64 tokens, which are 87.8% of the texts" in done.stdout
    again = commands.run(RECIPE, *command, "--tokens", 7)
    assert again.returncode != 0 and "not empty" in again.stderr
