"""How fast a training is here: how many steps fit, what they take, and saves by the clock."""

import itertools

import pytest
import torch
from trainings import arguments, rows, speculator

from modeling_speculator.trainers import SpeculatorTrainer, latest_checkpoint, pace
from modeling_speculator.trainers.pace import seconds_per_step, spoken, steps_within


@pytest.mark.parametrize(
    ("minutes", "seconds", "at_most", "expected"),
    [
        (4, 1.0, 800, 240),
        (4, 0.1, 800, 800),  # a fast machine: the whole size
        (4, 0.3, 800, 800),
        (1.5, 2.27, 120, 39),
        (1, 60.1, 800, 1),  # less than one fits
        (1, 0.01, 3, 3),
    ],
)
def test_how_many_steps_fit(minutes, seconds, at_most, expected):
    assert steps_within(minutes, seconds, at_most) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.2, "about 5 seconds"),
        (13, "about 15 seconds"),
        (54, "about 55 seconds"),
        (58, "about a minute"),
        (89, "about a minute"),
        (91, "about 2 minutes"),
        (360, "about 6 minutes"),
    ],
)
def test_times_as_they_are_said(seconds, expected):
    assert spoken(seconds) == expected


def test_what_a_step_takes(tmp_path, llama, make_trainer, monkeypatch):
    """The median, without the first one; slow steps are not waited for."""
    ends = iter([100, 102, 103, 104, 106, 200])
    monkeypatch.setattr(pace, "perf_counter", lambda: next(ends))
    trainer = make_trainer(llama, arguments(tmp_path, max_steps=9, save_strategy="no"))
    assert seconds_per_step(trainer) == 1.5  # of 2, 1, 1 and 2, after which 5 seconds have passed
    assert trainer.state.global_step == 5


@pytest.fixture
def clock(monkeypatch):
    """Twenty seconds pass between two looks at it."""
    looks = itertools.count(step=20)
    monkeypatch.setattr(pace, "perf_counter", lambda: next(looks))


def saved(folder):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def test_saves_by_the_clock(tmp_path, llama, clock):
    def train(name, **options):
        args = arguments(tmp_path / name, max_steps=7, save_total_limit=None, **options)
        SpeculatorTrainer(speculator(), llama, args, train_dataset=rows(16, 12)).train()
        return saved(tmp_path / name)

    assert train("by time", save_steps=100, save_minutes=0.6) == [2, 4, 6, 7]  # 40 seconds later, and at the end
    assert train("by both", save_steps=3, save_minutes=0.6) == [2, 3, 5, 6, 7]
    assert train("never", save_strategy="no", save_minutes=0) == []
    with pytest.raises(ValueError, match="`save_minutes` must be between 0 and"):
        arguments(tmp_path, save_minutes=-1)


def test_resumed_is_uninterrupted_whenever_it_was_saved(tmp_path, llama, make_trainer):
    whole = make_trainer(llama, arguments(tmp_path / "whole", max_steps=5, save_strategy="no"))
    whole.train()
    options = {"max_steps": 5, "save_steps": 100, "save_minutes": 0, "save_total_limit": None}
    make_trainer(llama, arguments(tmp_path / "parts", **options)).train()
    for step in (4, 5):
        (tmp_path / f"parts/checkpoint-{step}/complete.json").unlink()
    assert latest_checkpoint(tmp_path / "parts").endswith("checkpoint-3")
    resumed = make_trainer(llama, arguments(tmp_path / "parts", **options))
    resumed.train(resume_from_checkpoint=True)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
