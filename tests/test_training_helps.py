"""A short training of a real base model: both stages are worth something. By acceptance, never by time."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.trainers import (
    DataArguments,
    DistillationTrainer,
    SpeculatorTrainer,
    SpeculatorTrainingArguments,
    load_rows,
)


@pytest.fixture
def train(shared, tmp_path):
    """Trains a speculator for some steps, and says what it then reaches on held-out prompts."""
    folder = shared / "data/stories260K-hf"
    base_model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = (shared / "data/corpora/tinystories_4m_lowercase.txt").read_text()
    (tmp_path / "stories.txt").write_text(text[:1_000_000])  # more than the steps need
    data = DataArguments(
        data_files=[str(tmp_path / "stories.txt")],
        sequence_length=128,
        prompt_length=32,
        validation_sequences=32,
    )
    rows = {stage: load_rows(data, tokenizer, stage) for stage in (1, 2)}

    def train_(speculator, stage: int, steps: int, learning_rate: float = 5e-3) -> float:
        args = SpeculatorTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=max(1, steps),
            per_device_train_batch_size=16 if stage == 1 else 32,
            learning_rate=learning_rate,
            warmup_steps=10,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = (SpeculatorTrainer if stage == 1 else DistillationTrainer)(
            speculator, base_model, args, 32, 32, train_dataset=rows[stage][0], eval_dataset=rows[1][1]
        )
        if steps:
            trainer.train()
        # Prompts of the same held-out sequences, whatever the stage.
        return trainer.acceptance.measure(speculator, rows[1][1])["tokens_per_step"]

    return train_


def test_each_stage_helps(train):
    torch.manual_seed(0)
    speculator = MLPSpeculatorPreTrainedModel(
        MLPSpeculatorConfig(vocab_size=512, emb_dim=64, inner_dim=128, n_predict=3)
    )
    untrained = train(speculator, stage=1, steps=0)
    after_stage_1 = train(speculator, stage=1, steps=100)
    longer = train(copy.deepcopy(speculator), stage=1, steps=50, learning_rate=2e-3)
    after_stage_2 = train(speculator, stage=2, steps=50, learning_rate=2e-3)
    print(untrained, after_stage_1, longer, after_stage_2)
    assert untrained < 1.2
    assert after_stage_1 > 1.5
    assert after_stage_2 > longer + 0.1  # not by more training alone
