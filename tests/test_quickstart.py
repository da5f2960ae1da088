"""The quickstart: as large as the machine is fast, and the same on another machine that it goes on on."""

import json
import random
import sys

import pytest
import torch
from figures import check_figure, names, ticks
from safetensors.torch import load_file
from test_head_to_head import load

from modeling_speculator import SpeculationStatistics, precision
from modeling_speculator.measuring import plots
from modeling_speculator.trainers import pace, parse_recipe


SLOW_BF16, FAST_BF16 = ({torch.float32: 8.0, torch.bfloat16: rate} for rate in (1.0, 32.0))


def call(module, monkeypatch, **flags):
    arguments = []
    for key, value in flags.items():
        arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


@pytest.fixture
def machine(monkeypatch):
    """Sets what products and steps take."""

    def become(module, products, seconds_per_step):
        monkeypatch.setattr(precision, "measure_products", lambda device: products)
        monkeypatch.setattr(module, "seconds_per_step", lambda trainer: seconds_per_step)

    return become


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    words = [f"word{n}" for n in range(50)]
    texts = [" ".join(random.Random(seed).choices(words, k=400)) for seed in range(40)]
    file = tmp_path_factory.mktemp("corpus") / "train.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def test_a_base_model_goes_on_as_it_was_begun(tmp_path, corpus, monkeypatch, machine, capsys):
    """In its size and its precision, on a machine that would choose others; as if nothing had been between."""
    script = load("quickstart/train_base_model.py")
    tiny = {"corpus": corpus, "num_hidden_layers": 1, "hidden_size": 32, "minutes": 1}
    machine(script, FAST_BF16, 12.0)
    call(script, monkeypatch, output_dir=tmp_path / "whole", **tiny)
    assert "A step takes 12.00 seconds here, 5 steps about a minute" in capsys.readouterr().out

    monkeypatch.setattr(script, "TimedSaves", lambda minutes: pace.TimedSaves(0))
    monkeypatch.setattr(script, "SafeTrainer", interrupted_after(3, script.SafeTrainer))
    with pytest.raises(KeyboardInterrupt):
        call(script, monkeypatch, output_dir=tmp_path / "parts", **tiny)
    script = load("quickstart/train_base_model.py")
    machine(script, SLOW_BF16, 60.0)
    capsys.readouterr()
    call(script, monkeypatch, output_dir=tmp_path / "parts", **tiny)
    out = capsys.readouterr().out
    assert "in bfloat16" in out and "A step takes 60.00 seconds here, 2 steps about 2 minutes; stop with Ctrl-C" in out

    for folder in ("whole", "parts"):
        facts = json.loads((tmp_path / folder / "provenance.json").read_text())
        assert (facts["precision"], facts["max_steps"]) == ("bfloat16", 5)
        assert facts["weights"].keys() == {"model.safetensors"}
        assert json.loads((tmp_path / folder / "trainer_state.json").read_text())["global_step"] == 5
    whole, parts = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "parts"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def interrupted_after(steps, trainer_class):
    """A trainer whose user presses Ctrl-C in the step after so many."""

    class Interrupted(trainer_class):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == steps:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    return Interrupted


def test_a_fast_machine_trains_the_whole_size(tmp_path, corpus, monkeypatch, machine):
    script = load("quickstart/train_base_model.py")
    machine(script, SLOW_BF16, 0.01)
    tiny = {"corpus": corpus, "num_hidden_layers": 1, "hidden_size": 32}
    call(script, monkeypatch, output_dir=tmp_path, minutes=4, max_steps=2, **tiny)
    facts = json.loads((tmp_path / "provenance.json").read_text())
    assert (facts["precision"], facts["max_steps"]) == ("float32", 2)


def test_the_stages_are_measured(tmp_path, corpus, monkeypatch):
    """Each with its own trainer, on its own kind of rows, in the precision that is asked for."""
    monkeypatch.setattr(precision, "measure_products", lambda device: FAST_BF16)
    base, sizes = load("quickstart/train_base_model.py"), load("quickstart/size_stages.py")
    call(base, monkeypatch, corpus=corpus, output_dir=tmp_path, max_steps=1, num_hidden_layers=1, hidden_size=32,
         precision="float32")  # fmt: skip
    seen = []

    def seconds(trainer):
        row = trainer.train_dataset[0]["input_ids"]
        seen.append((type(trainer).__name__, len(row), trainer.args.bf16, trainer.base_model.dtype))
        assert pace.seconds_per_step(trainer) > 0
        return 3.0

    monkeypatch.setattr(sizes, "seconds_per_step", seconds)
    monkeypatch.setattr(pace, "ENOUGH", 0)
    flags = {"base_model": tmp_path, "corpus": corpus, "output": tmp_path / "stages.json", "minutes": [1, 9]}
    call(sizes, monkeypatch, precision="float32", **flags)
    assert json.loads((tmp_path / "stages.json").read_text()) == {"stage1": 20, "stage2": 50}  # all of stage 2
    assert seen == [
        ("SpeculatorTrainer", 256, False, torch.float32),
        ("DistillationTrainer", 64, False, torch.float32),
    ]


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """What the quickstart runs, {script: flags}, where the stages are sized to 30 and 20 steps."""

    def run(**flags):
        ran, quickstart = [], load("quickstart.py")
        (tmp_path / "stages.json").write_text('{"stage1": 30, "stage2": 20}')
        monkeypatch.setattr(quickstart, "run", lambda script, done=None, **flags: ran.append((script, flags)))
        call(quickstart, monkeypatch, output_dir=tmp_path, **flags)
        return ran

    return run


@pytest.mark.parametrize("asked", [{}, {"precision": "bfloat16"}], ids=str)
def test_its_steps(tmp_path, commands, asked):
    corpus, base, sizes, stage1, stage2, comparison = commands(**asked)
    expected = asked.get("precision", "fast")
    assert base[1]["precision"] == sizes[1]["precision"] == expected
    assert 12 > base[1]["minutes"] + sum(sizes[1]["minutes"]) > 0
    for (script, flags), steps in ((stage1, 30), (stage2, 20)):
        assert (script, flags["max_steps"]) == ("train_speculator.py", steps)
        model, data, training = parse_recipe(
            [part for key, value in flags.items() for part in (f"--{key}", str(value))]
        )
        assert expected in (training.precision, "fast")
        assert training.save_minutes <= 1
    assert comparison[1]["precision"] == "float32"  # in which outputs are identical
    assert comparison[1]["stage1"] == stage1[1]["output_dir"]


def test_given_models_are_compared_in_the_precision_that_is_fast(commands):
    *_, (script, flags) = commands(base_model="theirs", speculator="mine")
    assert (script, flags["precision"], flags["base_model"]) == ("quickstart/compare.py", "fast", "theirs")


def test_the_plot_of_what_is_accepted():
    """After each stage; none of a single head."""
    compare = load("quickstart/compare.py")
    machine = {"processor": "a CPU", "threads": 2}
    title = plots.title("Acceptance", {"base model": "theirs", "speculator": "run/mine"}, machine)
    before, after = (SpeculationStatistics(emitted, (), 9, 2) for emitted in ((1, 1, 2, 3), (3, 3, 2, 1)))
    figure = compare.by_position({"after stage 1": before, "after stage 2": after}, title)
    (axes,) = check_figure(figure, "base model theirs", "speculator run/mine", "a CPU, 2 threads")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("drafted token", "share of steps that emit it")
    assert ticks(axes) == [1, 2]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.5, 0.25], [0.75, 0.5]]
    assert names(figure) == ["after stage 1: 1.75 tokens per step", "after stage 2: 2.25 tokens per step"]
    assert names(compare.by_position({"": after}, title)) == ["2.25 tokens per step"]
    assert compare.by_position({"": SpeculationStatistics((1, 2), (), 9, 1)}, title) is None
