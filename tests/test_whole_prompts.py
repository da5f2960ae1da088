"""Stage 2 on prompts as they are: each as long as it is, none that is measured on."""

import json

import datasets
import pytest
import torch
from drafters import context_speculator
from tiny_models import character_tokenizer, prompts, tiny_model
from trainings import arguments, speculator

from modeling_speculator.trainers import DataArguments, DistillationTrainer, load_rows
from modeling_speculator.trainers.continuations import ContinuationSampler


def written(path, texts):
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in texts) + "\n")
    return str(path)


def test_rows(tmp_path, caplog):
    words = character_tokenizer()
    texts = ["abc", "abcdefgh", "ab cd", "a " * 30]
    data = DataArguments(
        prompts=written(tmp_path / "p.jsonl", texts),
        held_out_prompts=[written(tmp_path / "held_out.jsonl", ["  AB\n CD", "never"])],
        prompt_length=12,
        validation_fraction=0.5,
    )
    train, validation = load_rows(data, words, stage=2)
    rows = [*train, *validation]
    assert [len(row["input_ids"]) for row in rows] == [12, 12]
    for row, text in zip(rows, texts, strict=False):
        ids = words(text)["input_ids"]
        assert row["input_ids"] == [0] * (12 - len(ids)) + ids
        assert row["attention_mask"] == [0] * (12 - len(ids)) + [1] * len(ids)
    said = caplog.text
    assert "1 of 4 prompts are measured on, and left out" in said
    assert "1 of 3 prompts have more than `prompt_length=12` tokens" in said


def test_in_the_chat_template(tmp_path):
    words = character_tokenizer()
    words.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}zz{% endif %}"
    )
    data = DataArguments(prompts=written(tmp_path / "p.jsonl", ["abc"]), prompt_length=8, validation_fraction=0)
    (row,) = load_rows(data, words, stage=2)[0]
    assert row["input_ids"][-5:] == words("abczz")["input_ids"]


def test_what_is_refused(tmp_path):
    file = written(tmp_path / "p.jsonl", ["abc"])
    with pytest.raises(ValueError, match="in place of a `dataset`"):
        DataArguments(prompts=file, dataset="some/data")
    with pytest.raises(ValueError, match="name these, too"):
        DataArguments(data_files=["x.txt"], held_out_prompts=[file])
    with pytest.raises(ValueError, match="are for stage 2"):
        load_rows(DataArguments(prompts=file), character_tokenizer(), stage=1)
    with pytest.raises(ValueError, match="none is left to train on"):
        load_rows(DataArguments(prompts=file, held_out_prompts=[file]), character_tokenizer(), stage=2)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_is_continued_as_if_alone(llama, cache):
    """Whatever padding is before it, and by the same vectors."""
    inputs = prompts()
    sampler = ContinuationSampler(llama, 10, temperature=0.0, cache_implementation=cache)
    together = sampler(inputs["input_ids"], 0, inputs["attention_mask"])
    for row, length in enumerate([9, 4, 1]):
        alone = sampler(inputs["input_ids"][row : row + 1, 9 - length :], 0)
        assert together.tokens[row].tolist() == alone.tokens[0].tolist()
        torch.testing.assert_close(together.states[row], alone.states[0], rtol=1e-4, atol=1e-4)


def test_the_noise_belongs_to_the_prompt(llama):
    """Not to the padding that all prompts of a batch have."""
    inputs = prompts()
    sampler = ContinuationSampler(llama, 10)
    together = sampler.write(inputs["input_ids"], 7, inputs["attention_mask"])
    short = sampler.write(inputs["input_ids"][1:], 7, inputs["attention_mask"][1:])
    assert short.tolist() == together[1:].tolist()


@pytest.mark.parametrize("mask", [[1, 1, 0], [0, 0, 0], [1, 0, 1]], ids=str)
def test_padding_that_is_not_before_a_prompt(llama, mask):
    with pytest.raises(ValueError, match="must be 0 at padding before it"):
        ContinuationSampler(llama, 4).write(torch.tensor([[5, 6, 7]]), 0, torch.tensor([mask]))


@pytest.mark.parametrize("make", [speculator, "with a context layer"])
def test_longer_rows_than_prompts(tmp_path, llama, make):
    """Of those it is measured on, the end counts: padding comes first. Other columns are not looked at."""
    mask = [[0] * 12 + [1] * 4, [0] * 9 + [1] * 7]
    rows = datasets.Dataset.from_dict({"input_ids": [[7] * 16] * 2, "attention_mask": mask, "of": ["a", "b"]})
    model = speculator() if make is speculator else context_speculator(llama)
    options = {"facts": {"base_model": "here", "base_model_weights": "x"}, "prompt_length": 8, "generation_length": 8}
    trainer = DistillationTrainer(model, llama, arguments(tmp_path), train_dataset=rows, eval_dataset=rows, **options)
    (_, seen), n_own = trainer.acceptance.prompts(rows)
    assert seen.sum(-1).tolist() == [4, 7] and n_own == 2
    first = trainer.evaluate()
    assert (
        first["eval_tokens_per_step"] >= 1
        and trainer.evaluate()["eval_tokens_per_step"] == first["eval_tokens_per_step"]
    )
    trainer.write_continuations(tmp_path / "kept")
    assert set(trainer.train_dataset.column_names) == {"input_ids", "attention_mask", "continuation"}


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_training(tmp_path, is_kept):
    model = tiny_model("llama")
    data = DataArguments(
        prompts=written(tmp_path / "p.jsonl", ["abc", "abcdefgh", "ab cd", "xyz", "q", "hello"]),
        prompt_length=12,
        validation_fraction=0.34,
    )
    train, validation = load_rows(data, character_tokenizer(), stage=2)
    trainer = DistillationTrainer(
        speculator(),
        model,
        arguments(tmp_path / "out", max_steps=-1, num_train_epochs=2, learning_rate=1e-2),
        train_dataset=train,
        eval_dataset=validation,
        prompt_length=12,
        generation_length=12,
        facts={"base_model": "here", "base_model_weights": "x"},
    )
    before = trainer.evaluate()["eval_loss"]
    if is_kept:
        trainer.write_continuations(tmp_path / "kept")
        assert len(trainer.train_dataset) == len(train)  # which both epochs read
        assert set(trainer.train_dataset.column_names) == {"input_ids", "attention_mask", "continuation"}
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.evaluate()["eval_loss"] < before
