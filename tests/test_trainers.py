"""Training: what moves and what doesn't, what is logged, what is refused."""

import copy
import json

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from trainings import arguments, rows, speculator

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.trainers import DistillationTrainer, SpeculatorTrainer
from modeling_speculator.trainers.schedules import parabolic_cosine_schedule


def test_evaluation_is_repeatable_and_takes_no_random_numbers(tmp_path, llama, make_trainer):
    trainer = make_trainer(llama, arguments(tmp_path))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    losses = {trainer.evaluate()["eval_loss"] for _ in range(2)}
    assert len(losses) == 1
    assert torch.rand(1) == expected


def test_only_the_speculator_moves_and_all_of_it(tmp_path, llama, make_trainer):
    base_before = copy.deepcopy(llama.state_dict())
    model = speculator()
    before = copy.deepcopy(model.state_dict())
    make_trainer(llama, arguments(tmp_path), model).train()
    assert all(torch.equal(value, base_before[key]) for key, value in llama.state_dict().items())
    assert all(parameter.grad is None for parameter in llama.parameters())
    still = [key for key, value in model.state_dict().items() if torch.equal(value, before[key])]
    assert still == []
    assert not any("base_model" in name for name, _ in model.named_parameters())


def test_micro_batches_are_one_batch(tmp_path, llama, make_trainer):
    """However many of their positions count."""
    base_model = copy.deepcopy(llama)
    base_model.generation_config.eos_token_id = [3, 4, 5, 6]  # some texts end early
    sizes = {"whole": {"per_device_train_batch_size": 6}, "parts": {"gradient_accumulation_steps": 3}}
    trained = []
    for name, size in sizes.items():
        args = arguments(tmp_path / name, save_strategy="no", learning_rate=1e-2, logging_steps=1, **size)
        trainer = make_trainer(base_model, args, train_dataset=rows(24, 12, documents=True))
        trainer.train()
        trained.append(trainer)
    whole, parts = trained
    for one, other in zip(whole.state.log_history[:4], parts.state.log_history[:4], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_no_data(tmp_path, llama, make_trainer):
    with pytest.raises(ValueError, match="no rows"):
        make_trainer(llama, arguments(tmp_path), train_dataset=rows(0, 12))
    with pytest.raises(ValueError, match="`eval_dataset` is a stream"):
        make_trainer(llama, arguments(tmp_path), eval_dataset=rows(4, 12).to_iterable_dataset())
    with pytest.raises(ValueError, match="`generation_length=3` is too short for 3 heads"):
        make_trainer(llama, arguments(tmp_path), generation_length=3)


def test_what_is_logged(tmp_path, llama, make_trainer):
    trainer = make_trainer(llama, arguments(tmp_path))
    trainer.train()
    log = trainer.state.log_history[0]
    shares = {key: value for key, value in log.items() if key.startswith("share_of_time_")}
    is_stage_2 = isinstance(trainer, DistillationTrainer)
    assert shares.keys() == {
        f"share_of_time_{part}" for part in ("generation" if is_stage_2 else "base_model", "speculator")
    }
    assert sum(shares.values()) == pytest.approx(1)
    assert log["tokens_per_second"] > 0
    assert ("generated_tokens_per_second" in log) == is_stage_2
    assert all(0 <= log[f"accuracy_head_{head}"] <= log[f"accuracy_top_k_head_{head}"] <= 1 for head in (1, 2, 3))
    assert log["step"] == 2
    heads = [log[f"loss_head_{head}"] for head in (1, 2, 3)]
    assert log["loss"] == pytest.approx(sum(heads), rel=1e-3)
    assert all(0 <= log[f"accuracy_head_{head}"] <= 1 for head in (1, 2, 3))
    metrics = trainer.evaluate()
    assert 1 <= metrics["eval_tokens_per_step"] <= 4
    assert 1 <= metrics["eval_tokens_per_step_sampled"] <= 4
    assert metrics["eval_loss"] == pytest.approx(
        sum(metrics[f"eval_loss_head_{head}"] for head in (1, 2, 3)), rel=1e-3
    )
    assert all(0 <= metrics[f"eval_accuracy_head_{head}"] <= 1 for head in (1, 2, 3))


def test_learning_rate_is_the_papers():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = parabolic_cosine_schedule(optimizer, num_warmup_steps=750, num_training_steps=15_000)
    rates = []
    for _ in range(15_001):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0
    assert rates[375] == pytest.approx(0.75e-3)  # 1 - (1 - 1/2)^2
    assert rates[750] == max(rates) == pytest.approx(1e-3)
    assert rates[15_000] == pytest.approx(1e-4)


def test_training_helps(tmp_path, llama):
    """A minute's work in small: after training on one text, the heads know it."""
    model = speculator()
    data = rows(2, 24)
    args = arguments(tmp_path, max_steps=150, learning_rate=1e-2, save_strategy="no", weight_decay=0.0)
    trainer = SpeculatorTrainer(model, llama, args, train_dataset=data, eval_dataset=data)
    untrained = trainer.evaluate()
    trainer.train()
    trained = trainer.evaluate()
    for head in (1, 2, 3):
        assert trained[f"eval_accuracy_head_{head}"] > 0.9 > 0.3 > untrained[f"eval_accuracy_head_{head}"]


def test_bad_input(tmp_path, llama):
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="too short for 3 heads"):
        SpeculatorTrainer(speculator(), llama, args).batch({"input_ids": torch.zeros(2, 4, dtype=torch.long)})
    other = MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(vocab_size=VOCAB + 1025, emb_dim=32))
    with pytest.raises(ValueError, match=f"`vocab_size={VOCAB + 1025}`.*`vocab_size={VOCAB}`"):
        SpeculatorTrainer(other, llama, args)
    with pytest.raises(ValueError, match="149 tokens.*128 positions.*sequence_length"):
        trainer = SpeculatorTrainer(speculator(), tiny_model("gpt2"), args)
        trainer.batch({"input_ids": torch.zeros(2, 150, dtype=torch.long)})
    with pytest.raises(ValueError, match="132 tokens.*128 positions.*generation_length"):  # and not when it evaluates
        SpeculatorTrainer(speculator(), tiny_model("gpt2"), args, eval_dataset=rows(4, 12), generation_length=120)
    with pytest.raises(ValueError, match="parabolic_schedule: false"):
        arguments(tmp_path, lr_scheduler_type="cosine")
    with pytest.raises(ValueError, match="`stage` must be 1"):
        arguments(tmp_path, stage=3)


def test_other_schedules_are_honoured(tmp_path, llama):
    args = arguments(tmp_path, parabolic_schedule=False, lr_scheduler_type="constant", learning_rate=0.5)
    trainer = SpeculatorTrainer(speculator(), llama, args, train_dataset=rows(16, 12))
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 0.5
    assert json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())["global_step"] == 4


def test_base_models_of_another_dtype(tmp_path, make_trainer):
    trainer = make_trainer(tiny_model("llama").to(torch.bfloat16), arguments(tmp_path, bf16=True))
    trainer.train()
    assert trainer.model.dtype == torch.float32
