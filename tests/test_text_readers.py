"""Speculators whose drafts depend on the whole text, in both stages of training."""

import datasets
import pytest
import torch
from test_drafter_state import MAKERS
from trainings import arguments, rows

from modeling_speculator.measuring.evaluation import starts_of_drafts
from modeling_speculator.trainers import (
    DistillationTrainer,
    ModelArguments,
    SpeculatorTrainer,
    load_or_create_speculator,
)


METHODS = {
    "context": {"method": "context", "context_heads": 2, "feature_layers": [1]},
    "eagle": {"method": "eagle", "context_heads": 2},
    "eagle3": {"method": "eagle", "context_heads": 2, "context_kv_heads": 1, "feature_layers": [0, 1]},
    "hydra++": {"method": "hydra", "context_heads": 2, "prefix_layer": True, "n_blocks": 2},
    "streaming": {"method": "streaming", "n_stream_layers": 1, "stream_lora_rank": 4},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["stage 1", "documents", "stage 2", "whole prompts", "written before"])
def test_a_recipe_trains_one(tmp_path, llama, kind, method):
    model = load_or_create_speculator(ModelArguments(base_model="here", n_predict=3, **METHODS[method]), llama)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    data = rows(4, 24, documents=kind == "documents")
    if kind == "whole prompts":
        mask = torch.tensor([[0] * n + [1] * (24 - n) for n in (0, 9, 20, 5)])
        ids = torch.tensor(data["input_ids"][:]) * mask
        data = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})
    args = arguments(tmp_path, max_steps=60, learning_rate=1e-2, save_strategy="no", weight_decay=0.0)
    is_first = kind in ("stage 1", "documents")
    trainer_class, more = (SpeculatorTrainer, {}) if is_first else (DistillationTrainer, {"generation_length": 12})
    more |= {"facts": {"base_model": "here", "base_model_weights": "x"}} if kind == "written before" else {}
    trainer = trainer_class(model, llama, args, train_dataset=data, eval_dataset=data, **more)
    untrained = trainer.evaluate()
    if kind == "written before":
        trainer.write_continuations(tmp_path / "written")
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < untrained["eval_loss"] - 0.1
    assert not [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    assert all(weight.grad is None for weight in llama.parameters())


@pytest.mark.parametrize("make", MAKERS)
def test_documents_are_kept_apart(llama, tmp_path, make):
    """In the layer, too: a document is read as if it stood alone."""
    speculator, args = make(llama), arguments(tmp_path)
    data = rows(2, 24).add_column("position_ids", [[*range(10), *range(14)], [*range(6), *range(18)]])
    trainer = SpeculatorTrainer(speculator, llama, args, train_dataset=data)
    batch = trainer.batch({name: torch.tensor(data[name][:]) for name in data.column_names})
    bound = speculator.beside(llama)
    together = bound.with_context(batch.hidden_states, batch.input_ids[:, : batch.segments.shape[1]], *batch[4:])
    for row in range(2):
        begins = data[row]["position_ids"].index(0, 1)
        text = torch.tensor([data[row]["input_ids"][begins:]])
        alone = starts_of_drafts(llama, speculator, text, torch.ones_like(text))[:, : together.shape[1] - begins]
        torch.testing.assert_close(together[row : row + 1, begins:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", MAKERS)
def test_prompts_are_read_but_not_learned(llama, tmp_path, make):
    """Stage 2 takes the loss of the continuation only, whose context the prompt is."""
    speculator = make(llama)
    trainer = DistillationTrainer(
        speculator, llama, arguments(tmp_path), train_dataset=rows(2, 10), generation_length=12
    )
    prompt = torch.tensor(rows(2, 10)["input_ids"][:])
    written = trainer._read(trainer._write({"input_ids": prompt}, 0))
    assert written.states.shape[1] == 21 and written.labels.shape[1] == 12
    batch = trainer.batch(trainer._write({"input_ids": prompt}, 0))
    assert batch.hidden_states.shape[1] == 18 and batch.labels.shape[1] == 11
    text = torch.cat([prompt, written.tokens[:, -12:]], dim=1)
    starts = starts_of_drafts(llama, speculator, text, torch.ones_like(text))
    torch.testing.assert_close(written.starts(speculator.beside(llama)), starts[:, 9:], rtol=1e-4, atol=1e-4)
