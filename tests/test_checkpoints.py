"""An interrupted run goes on as if it had not been: which checkpoints count, which are kept, what is beside them."""

import copy
import json
from pathlib import Path

import commands
import pytest
import torch
from safetensors.torch import load_file
from trainings import arguments, rows, speculator
from transformers import TrainerCallback

from modeling_speculator.trainers import SpeculatorTrainer, latest_checkpoint


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


KILLED = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny_models import tiny_model
from trainings import SpeculatorTrainer, arguments, rows, speculator
from modeling_speculator.trainers import safe_trainer
mark = safe_trainer.mark_complete
def mark_or_die(path, *args, **options):
    mark(path, *args, **options) if path.name == "checkpoint-2" else os._exit(9)
safe_trainer.mark_complete = mark_or_die
args = arguments(sys.argv[1], save_total_limit=1)
SpeculatorTrainer(speculator(), tiny_model("llama"), args, train_dataset=rows(16, 12)).train()
"""


def test_a_run_that_was_killed_during_a_save(tmp_path, llama):
    """A process that ends while it writes its second checkpoint, and one that goes on from there."""
    (tmp_path / "killed.py").write_text(KILLED)
    done = commands.run(tmp_path / "killed.py", tmp_path / "killed")
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
    make_trainer(llama, arguments(tmp_path, save_steps=1)).train()
    trainer = make_trainer(llama, arguments(tmp_path, save_steps=1))
    monkeypatch.setattr(trainer, "_save_rng_state", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert latest_checkpoint(tmp_path).endswith("checkpoint-4")
    assert not (tmp_path / "checkpoint-2/complete.json").exists()


def test_a_newer_run_never_goes_on_from_an_older_ones_checkpoints(tmp_path, llama, make_trainer):
    """Whose numbers are higher, with files of its own."""
    make_trainer(llama, arguments(tmp_path)).train()
    (tmp_path / "checkpoint-2/of_the_older_run.bin").write_text("")
    make_trainer(llama, arguments(tmp_path, learning_rate=0.5, max_steps=2)).train()
    assert not (tmp_path / "checkpoint-2/of_the_older_run.bin").exists()
    assert (tmp_path / "checkpoint-4/complete.json").is_file()
    assert latest_checkpoint(tmp_path).endswith("checkpoint-2")
    again = make_trainer(llama, arguments(tmp_path, learning_rate=0.5, max_steps=3, save_steps=3))
    again.train(resume_from_checkpoint=True)
    assert again.checkpoint.endswith("checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-4` is no complete checkpoint of the training in"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_resume_with_other_arguments_is_refused(tmp_path, llama, make_trainer):
    make_trainer(llama, arguments(tmp_path)).train()
    other = make_trainer(llama, arguments(tmp_path, learning_rate=0.5, seed=1))
    with pytest.raises(ValueError, match="`learning_rate` was 0.001, is 0.5; `seed` was 42, is 1"):
        other.train(resume_from_checkpoint=True)
    assert other.state.global_step == 0


def test_other_processes_go_on_with_the_same_batch(tmp_path, llama, make_trainer):
    """Here: micro-batches in the place of processes."""
    whole = make_trainer(llama, arguments(tmp_path / "whole"))
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(llama, arguments(tmp_path / "parts"), callbacks=[Interrupt(at_step=3)]).train()
    halved = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    resumed = make_trainer(llama, arguments(tmp_path / "parts", **halved))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.checkpoint.endswith("checkpoint-2") and resumed.state.global_step == 4
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


class Interrupt(TrainerCallback):
    """Ctrl-C."""

    def __init__(self, at_step: int):
        self.at_step = at_step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at_step:
            raise KeyboardInterrupt


def test_an_interrupted_training_says_what_is_kept(tmp_path, llama, make_trainer):
    for options, step, kept in (
        ({}, 3, "checkpoint-2 is kept: the same command goes on from there."),
        ({"overwrite_output_dir": True}, 3, "goes on from there. Leave out `--overwrite_output_dir`, which would de"),
        ({"overwrite_output_dir": True}, 1, "Nothing was saved yet."),
    ):
        args = arguments(tmp_path, **options)
        with pytest.raises(KeyboardInterrupt, match=kept):
            make_trainer(llama, args, callbacks=[Interrupt(step)]).train()


def test_a_model_alone_is_nothing_to_go_on_from(tmp_path, llama, make_trainer):
    make_trainer(llama, arguments(tmp_path, save_only_model=True)).train()
    assert latest_checkpoint(tmp_path) is None


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
    text = (tmp_path / "provenance.json").read_text()
    trainer.save_model()
    assert (tmp_path / "provenance.json").read_text() == text  # the time after a training is not training


@pytest.mark.parametrize("max_steps", [3, 8])
def test_a_finished_run_keeps_its_provenance(tmp_path, llama, make_trainer, max_steps):
    """Run again, whether it ends within an epoch or with one, so that what is pushed is the same."""
    for facts in ({"data": "first"}, {"data": "second"}):
        trainer = make_trainer(llama, arguments(tmp_path, max_steps=max_steps, save_steps=1), facts=facts)
        trainer.train(resume_from_checkpoint=facts["data"] == "second")
        trainer.save_model()
        text = (tmp_path / "provenance.json").read_text()
        assert json.loads(text)["data"] == "first"
    (tmp_path / "provenance.json").unlink()  # killed before it was written: the checkpoint's
    trainer.save_model()
    assert json.loads((tmp_path / "provenance.json").read_text())["data"] == "first"
    trainer = make_trainer(llama, arguments(tmp_path, max_steps=max_steps + 1), facts={"data": "third"})
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    assert json.loads((tmp_path / "provenance.json").read_text())["data"] == "third"


def test_the_time_before_an_interruption_counts(tmp_path, llama, make_trainer):
    make_trainer(llama, arguments(tmp_path)).train()
    file = tmp_path / "checkpoint-4/provenance.json"
    seconds = json.loads(file.read_text())["seconds"]
    # Long ago, in a file of the same size: the checkpoint is to stay complete.
    file.write_text(file.read_text().replace(f'"seconds": {seconds}', f'"seconds": 9{str(seconds)[1:]}'))
    trainer = make_trainer(llama, arguments(tmp_path, max_steps=6))
    trainer.train(resume_from_checkpoint=True)
    assert 9 <= trainer.seconds < 60
