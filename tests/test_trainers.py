"""Training: the alignment of both stages, what moves and what doesn't, resuming, and what is logged."""

import copy
import json
import subprocess
import sys

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VOCAB, tiny_model
from trainings import rows, speculator
from transformers import LlamaForCausalLM

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.trainers import (
    DistillationTrainer,
    SpeculatorTrainer,
    SpeculatorTrainingArguments,
    latest_checkpoint,
)
from modeling_speculator.trainers.losses import mixed
from modeling_speculator.trainers.schedules import parabolic_cosine_schedule


class CountingModel(LlamaForCausalLM):
    """After token t always comes t + 1; the context vector holds the token that was read last, in every entry."""

    def __init__(self, config):
        super().__init__(config)

        def what_was_read(module, args, kwargs, output):
            output.last_hidden_state = kwargs["input_ids"][:, :, None].expand_as(output.last_hidden_state).float()
            return output

        self.model.register_forward_hook(what_was_read, with_kwargs=True)

    def forward(self, input_ids=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        follower = torch.nn.functional.one_hot((input_ids[:, -1:] + 1) % VOCAB, VOCAB)
        outputs.logits = 1e4 * follower.float()
        return outputs


@pytest.fixture
def counting(llama):
    model = CountingModel(copy.deepcopy(llama.config)).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def arguments(tmp_path, **kwargs):
    defaults = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return SpeculatorTrainingArguments(**defaults | kwargs)


TRAINERS = {"stage 1": (SpeculatorTrainer, {}), "stage 2": (DistillationTrainer, {"generation_length": 8})}


@pytest.fixture(params=TRAINERS)
def make_trainer(request):
    trainer_class, options = TRAINERS[request.param]

    def make(base_model, args, model=None, **kwargs):
        kwargs = {"train_dataset": rows(16, 12), "eval_dataset": rows(4, 12, seed=1)} | options | kwargs
        return trainer_class(model=model or speculator(), base_model=base_model, args=args, **kwargs)

    return make


@pytest.mark.parametrize("n_predict", [1, 3])
def test_stage_1_alignment(tmp_path, counting, n_predict):
    trainer = SpeculatorTrainer(speculator(n_predict), counting, arguments(tmp_path))
    text = torch.arange(20).repeat(2, 1)
    hidden_states, input_ids, labels, _ = trainer.batch({"input_ids": text})
    read = hidden_states[0, :, 0].long()  # the token at each position
    assert read.tolist() == list(range(20 - n_predict - 1))  # from the first on, as far as every head has a target
    for position, token in enumerate(read.tolist()):
        assert input_ids[0, position] == token + 1  # the token drawn from that vector
        assert labels[0, position : position + n_predict].tolist() == [token + 2 + i for i in range(n_predict)]
    assert labels.shape[1] == len(read) + n_predict - 1
    trainer.model(hidden_states, input_ids, labels)  # the lengths are those of the forward


@pytest.mark.parametrize("n_predict", [1, 3])
def test_stage_2_alignment(tmp_path, counting, n_predict):
    trainer = DistillationTrainer(speculator(n_predict), counting, arguments(tmp_path), generation_length=10)
    prompts = torch.tensor([[3, 50, 20], [7, 7, 30]])  # generated: 21, 22, ... and 31, 32, ...
    hidden_states, input_ids, labels, _ = trainer.batch({"input_ids": prompts})
    for row, last in enumerate([20, 30]):
        read = hidden_states[row, :, 0].long().tolist()
        assert read == [last + i for i in range(10 - n_predict)]  # the prompt's last position comes first
        assert input_ids[row].tolist() == [last + 1 + i for i in range(9)]
        assert labels[row].tolist() == [last + 2 + i for i in range(9)]


def test_stage_2_stops_at_the_end_of_a_text(tmp_path, counting):
    counting.generation_config.eos_token_id = [25, 40]
    trainer = DistillationTrainer(speculator(), counting, arguments(tmp_path), generation_length=10)
    prompts = torch.tensor([[25, 3, 20], [7, 7, 30]])
    labels = trainer.batch({"input_ids": prompts}).labels
    assert labels[0].tolist() == [22, 23, 24, 25] + 5 * [-100]
    assert labels[1].tolist() == list(range(32, 41))


def test_stage_2_when_every_text_ends_at_once(tmp_path, counting):
    counting.generation_config.eos_token_id = 21
    trainer = DistillationTrainer(speculator(), counting, arguments(tmp_path), generation_length=10)
    prompts = torch.tensor([[25, 3, 20], [7, 7, 20]])
    batch = trainer.batch({"input_ids": prompts})
    assert (batch.labels == -100).all()
    assert trainer.compute_loss(trainer.model, {"input_ids": prompts}) == 0


def test_evaluation_is_repeatable_and_takes_no_random_numbers(tmp_path, llama, make_trainer):
    trainer = make_trainer(llama, arguments(tmp_path))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    losses = {trainer.evaluate()["eval_loss"] for _ in range(2)}
    assert len(losses) == 1
    assert torch.rand(1) == expected


def test_stage_2_samples_from_the_base_model(tmp_path, llama):
    """Not greedily, and from the ten most probable tokens only, whatever the base model's own config says."""
    model = copy.deepcopy(llama)
    model.generation_config.do_sample, model.generation_config.top_k = False, 1
    model.generation_config.repetition_penalty, model.generation_config.num_beams = 5.0, 2
    model.generation_config.return_dict_in_generate, model.generation_config.no_repeat_ngram_size = True, 1
    theirs = model.generation_config
    trainer = DistillationTrainer(speculator(), model, arguments(tmp_path), generation_length=20)
    prompts = torch.randint(VOCAB, (8, 4), generator=torch.Generator().manual_seed(0))
    input_ids = trainer.batch({"input_ids": prompts}).input_ids
    text = torch.cat([prompts, input_ids], dim=1)
    with torch.no_grad():
        logits = llama(text).logits[:, 3:-1]
    rank = (logits > logits.gather(2, text[:, 4:, None])).sum(-1)
    assert model.generation_config is theirs
    assert rank.max() < 10
    assert rank.float().mean() > 0.3


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


DAMAGES = {  # by a kill during the save
    "no marker": lambda checkpoint: (checkpoint / "complete.json").unlink(),
    "a file cut off": lambda checkpoint: (checkpoint / "trainer_state.json").write_text('{"cut off'),
    "a file missing": lambda checkpoint: (checkpoint / "optimizer.pt").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_resumed_is_uninterrupted(tmp_path, llama, make_trainer, damage):
    whole = make_trainer(llama, arguments(tmp_path / "whole"))
    whole.train()
    make_trainer(llama, arguments(tmp_path / "parts", max_steps=4, save_total_limit=9)).train()
    damage(tmp_path / "parts/checkpoint-4")
    checkpoint = latest_checkpoint(str(tmp_path / "parts"))
    assert checkpoint.endswith("checkpoint-2")
    resumed = make_trainer(llama, arguments(tmp_path / "parts"))
    resumed.train(resume_from_checkpoint=True)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert latest_checkpoint(str(tmp_path / "nothing here")) is None
    (tmp_path / "parts/checkpoint-best").mkdir()
    assert latest_checkpoint(str(tmp_path / "parts")).endswith("checkpoint-4")


def test_a_run_that_was_killed_during_a_save(tmp_path, llama):
    """A process that ends while it writes its second checkpoint, and one that goes on from there."""
    code = f"""if True:
        import os, sys
        sys.path[:0] = {sys.path!r}
        import conftest  # one thread, as here
        from test_trainers import arguments, rows, speculator, tiny_model, SpeculatorTrainer
        from modeling_speculator.trainers import checkpoints
        mark = checkpoints.mark_complete
        def mark_or_die(path, **options):
            mark(path, **options) if path.name == "checkpoint-2" else os._exit(9)
        checkpoints.mark_complete = mark_or_die
        args = arguments({str(tmp_path / "killed")!r}, save_total_limit=1)
        SpeculatorTrainer(speculator(), tiny_model("llama"), args, train_dataset=rows(16, 12)).train()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert (tmp_path / "killed/checkpoint-4/model.safetensors").is_file()  # there, but who knows
    assert latest_checkpoint(tmp_path / "killed").endswith("checkpoint-2")  # kept although one more was begun
    killed, whole = (
        SpeculatorTrainer(speculator(), llama, arguments(tmp_path / name), train_dataset=rows(16, 12))
        for name in ("killed", "whole")
    )
    killed.train(resume_from_checkpoint=True)
    whole.train()
    assert killed.state.global_step == 4
    for one, other in zip(killed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("steps", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 2}], ids=str)
def test_a_finished_run_is_not_trained_on(tmp_path, llama, make_trainer, steps):
    data = {"train_dataset": rows(4, 12)}
    first = make_trainer(llama, arguments(tmp_path, **steps), **data)
    first.train()
    again = make_trainer(llama, arguments(tmp_path, **steps), **data)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == first.state.global_step == 4
    assert not (tmp_path / "checkpoint-5").exists()
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_which_checkpoints_are_let_go(tmp_path, llama, make_trainer):
    """Those that were cut off, whatever their number, and the oldest; never the last whole one."""
    make_trainer(llama, arguments(tmp_path, save_total_limit=None, save_steps=1)).train()
    (tmp_path / "checkpoint-4/complete.json").unlink()
    (tmp_path / "checkpoint-9").mkdir()
    make_trainer(llama, arguments(tmp_path, save_total_limit=2, max_steps=5, save_steps=5)).train(True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def test_a_checkpoint_that_is_written_again_is_not_whole_meanwhile(tmp_path, llama, make_trainer, monkeypatch):
    make_trainer(llama, arguments(tmp_path)).train()
    trainer = make_trainer(llama, arguments(tmp_path))
    monkeypatch.setattr(trainer, "_save_rng_state", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert latest_checkpoint(tmp_path).endswith("checkpoint-4")
    assert not (tmp_path / "checkpoint-2/complete.json").exists()


def test_a_model_alone_is_nothing_to_go_on_from(tmp_path, llama, make_trainer):
    make_trainer(llama, arguments(tmp_path, save_only_model=True)).train()
    assert latest_checkpoint(tmp_path) is None


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


def test_resuming_in_mid_epoch_of_a_stream(tmp_path, llama, make_trainer):
    def make(folder, **kwargs):
        stream = rows(14, 12).to_iterable_dataset()  # of which a step takes 6 rows
        args = arguments(tmp_path / folder, gradient_accumulation_steps=3, max_steps=2, save_steps=1, **kwargs)
        return make_trainer(llama, args, train_dataset=stream)

    whole = make("whole")
    whole.train()
    make("parts").train()
    (tmp_path / "parts/checkpoint-2/complete.json").unlink()
    resumed = make("parts")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path, llama, make_trainer):
    """By tokens per step."""
    args = arguments(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=6,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="tokens_per_step",
        greater_is_better=True,
    )
    trainer = make_trainer(llama, args)
    found = {2: 1.5, 4: 1.1, 6: 1.2}
    trainer.acceptance.measure = lambda *args: {"tokens_per_step": found[trainer.state.global_step]}
    trainer.train()
    assert trainer.state.best_metric == 1.5
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    trainer.save_model()
    found = json.loads((tmp_path / "provenance.json").read_text())
    assert (found["steps"], found["steps_trained"]) == (2, 6)
    best = load_file(tmp_path / "checkpoint-2/model.safetensors")
    assert all(torch.equal(value, best[key]) for key, value in trainer.model.state_dict().items())


def test_documents_that_share_a_sequence(tmp_path, counting):
    """Their first n_predict + 1 tokens are no targets, and none of what is one is guessed from another document."""
    trainer = SpeculatorTrainer(speculator(), counting, arguments(tmp_path))
    text = torch.tensor([[*range(9), *range(30, 39)]])
    position_ids = torch.tensor([[*range(9), *range(9)]])
    hidden_states, _, labels, _ = trainer.batch({"input_ids": text, "position_ids": position_ids})
    read = hidden_states[0, :, 0].tolist()
    assert labels[0].tolist() == [*range(2, 9), -100, -100, -100, -100, *range(34, 39)]
    for head in range(3):
        for position, token in enumerate(read):
            target = int(labels[0, position + head])
            assert target == -100 or (target < 30) == (token < 30)
    plain = trainer.batch({"input_ids": text}).labels
    assert plain[0].tolist() == [*range(2, 9), *range(30, 39)]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, llama, make_trainer):
    model = speculator()
    trainer = make_trainer(llama, arguments(tmp_path, max_steps=4, save_steps=1, logging_steps=100), model)
    save = trainer.save_model

    def break_then_save(*args, **kwargs):
        save(*args, **kwargs)
        with torch.no_grad():
            model.speculator.proj[0].weight.fill_(float("nan"))

    trainer.save_model = break_then_save
    with pytest.raises(ValueError, match="not finite at step 2.*checkpoint-1. Lower `learning_rate`"):
        trainer.train()
    assert latest_checkpoint(tmp_path).endswith("checkpoint-1")
    assert not (tmp_path / "checkpoint-2").exists()


def test_a_loss_that_is_not_finite_when_it_is_logged(tmp_path, llama, make_trainer):
    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("inf"))
    trainer = make_trainer(broken, arguments(tmp_path, save_strategy="no"))
    with pytest.raises(ValueError, match="not finite at step 2.*complete checkpoint, None"):
        trainer.train()


def test_no_data(tmp_path, llama, make_trainer):
    with pytest.raises(ValueError, match="no rows"):
        make_trainer(llama, arguments(tmp_path), train_dataset=rows(0, 12))
    with pytest.raises(ValueError, match="`eval_dataset` is a stream"):
        make_trainer(llama, arguments(tmp_path), eval_dataset=rows(4, 12).to_iterable_dataset())
    with pytest.raises(ValueError, match="`generation_length=3` is too short for 3 heads"):
        make_trainer(llama, arguments(tmp_path), generation_length=3)


def test_provenance_lies_beside_the_weights(tmp_path, llama, make_trainer):
    trainer = make_trainer(llama, arguments(tmp_path, learning_rate=0.5, hub_token="secret"), facts={"data": {"a": 1}})
    trainer.train()
    trainer.save_model()
    for folder, steps in ((tmp_path / "checkpoint-2", 2), (tmp_path, 4)):
        text = (folder / "provenance.json").read_text()
        found = json.loads(text)
        assert found["steps"] == steps
        assert found["arguments"]["learning_rate"] == 0.5
        assert found["speculator"]["n_predict"] == 3
        assert found["data"] == {"a": 1}
        assert {"torch", "transformers", "modeling-speculator"} <= found["versions"].keys()
        assert {"base_model", "base_model_revision", "git_revision", "machine", "seconds"} <= found.keys()
        assert "secret" not in text and str(tmp_path) not in text
    seconds = found["seconds"]
    longer = make_trainer(llama, arguments(tmp_path, max_steps=6))
    longer.train(resume_from_checkpoint=True)
    assert longer.seconds_before == pytest.approx(
        json.loads((tmp_path / "checkpoint-4/provenance.json").read_text())["seconds"]
    )
    assert longer.seconds_before <= seconds


@pytest.mark.parametrize("loss", [["lk_hybrid"], ["total_variation", "cross_entropy"]])
def test_losses_on_the_base_models_distribution(tmp_path, llama, make_trainer, loss):
    """Of the trainer's batch: head i at position j against the logits that the next tokens were drawn from."""
    trainer = make_trainer(llama, arguments(tmp_path, loss=loss, head_weights=[1.0, 0.5, 0.25]))
    text, first = torch.tensor(rows(2, 12)["input_ids"][:]), 0  # the first context vector's position
    batch = trainer.batch({"input_ids": text})
    n = batch.hidden_states.shape[1]
    if isinstance(trainer, DistillationTrainer):
        text, first = torch.cat([text, batch.input_ids], dim=1), 11
    logits = llama(text).logits[:, first:]
    expected = 0.0
    for head, weight in enumerate([1.0, 0.5, 0.25]):
        ours = trainer.model(batch.hidden_states, batch.input_ids).logits[head].flatten(0, 1)
        theirs = logits[:, head + 1 : head + 1 + n].flatten(0, 1)
        labels = batch.labels[:, head : head + n].flatten()
        expected += weight * mixed(loss, [1.0] * len(loss), ours, labels, theirs).mean()
    trainer.batch = lambda inputs: batch
    torch.testing.assert_close(trainer.compute_loss(trainer.model, {}), expected, atol=1e-4, rtol=1e-4)


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


def test_accuracy_is_counted_per_head(tmp_path, counting):
    """A speculator that always predicts 7 is right where 7 comes, head by head."""
    model = speculator()
    trainer = SpeculatorTrainer(model, counting, arguments(tmp_path, per_device_eval_batch_size=3))
    with torch.no_grad():
        for head, ln in zip(model.speculator.head, model.speculator.ln, strict=True):
            ln.weight.zero_()
            ln.bias.fill_(1.0)
            head.weight.zero_()
            head.weight[7] = 1.0
    text = [[0, 1, 2, 7, 4, 5, 7, 7]] * 4  # head 1 is trained on 2 7 4 5, head 2 on 7 4 5 7, head 3 on 4 5 7 7
    metrics = trainer.evaluate(datasets.Dataset.from_dict({"input_ids": text}))
    assert [metrics[f"eval_accuracy_head_{head}"] for head in (1, 2, 3)] == [0.25, 0.5, 0.5]


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
    other = MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(vocab_size=VOCAB + 1, emb_dim=32))
    with pytest.raises(ValueError, match=f"`vocab_size={VOCAB + 1}`.*`vocab_size={VOCAB}`"):
        SpeculatorTrainer(other, llama, args)
    with pytest.raises(ValueError, match="149 tokens.*128 positions.*sequence_length"):
        trainer = SpeculatorTrainer(speculator(), tiny_model("gpt2"), args)
        trainer.batch({"input_ids": torch.zeros(2, 150, dtype=torch.long)})
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
