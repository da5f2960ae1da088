"""The dtype that is fast on a machine: how it is found, what it decides, and that a run keeps its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from test_distributed import launch
from trainings import arguments

from modeling_speculator import precision
from modeling_speculator.precision import faster_of, keep_precision, measure_products, resolve_precision
from modeling_speculator.trainers import latest_checkpoint, parse_recipe


RECIPES = Path(__file__).parents[1] / "recipes"
SLOW_BF16 = {torch.float32: 6e10, torch.bfloat16: 3e9}  # FLOP/s of two cores with AVX2
FAST_BF16 = {torch.float32: 2e11, torch.bfloat16: 8e11}  # ... and with AMX


@pytest.fixture
def machine(monkeypatch):
    """Sets what is measured; a machine of None must not be measured."""

    def become(products):
        monkeypatch.setattr(precision, "measure_products", lambda device: products or pytest.fail("measured"))

    return become


@pytest.mark.parametrize(
    ("products", "expected"),
    [
        (SLOW_BF16, torch.float32),
        (FAST_BF16, torch.bfloat16),
        ({torch.float32: 100.0, torch.bfloat16: 149.0}, torch.float32),  # nearly equal: the exact one
        ({torch.float32: 100.0, torch.bfloat16: 150.0}, torch.bfloat16),
        ({torch.float32: 100.0}, torch.float32),  # a GPU without bfloat16
    ],
)
def test_which_dtype_is_fast(machine, products, expected):
    assert faster_of(products) == expected
    machine(products)
    assert resolve_precision("fast", "cpu") == str(expected).removeprefix("torch.")


def test_products_are_measured_in_both_dtypes(monkeypatch):
    """The rate of the fastest one, by a clock that says how long each takes."""
    times = iter([0, 2, 2, 3, 10, 14, 14, 22])  # seconds: 2 and 1 in float32, 4 and 8 in bfloat16
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(precision, "CPU_SHAPE", (2, 3, 5))
    monkeypatch.setattr(precision, "SECONDS", 3)
    rates = measure_products("cpu")
    assert rates == {torch.float32: 60.0, torch.bfloat16: 15.0}


def test_precisions_that_are_said(machine):
    machine(None)
    assert [resolve_precision(name, "cpu") for name in ("float32", "bfloat16")] == ["float32", "bfloat16"]
    with pytest.raises(ValueError, match="must be one of fast, float32, bfloat16, but is 'float16'"):
        resolve_precision("float16", "cpu")


def test_work_in_a_folder_keeps_its_precision(tmp_path, machine):
    machine(FAST_BF16)
    assert keep_precision(tmp_path / "new", "fast") == "bfloat16"
    machine(None)
    assert keep_precision(tmp_path / "new", "fast") == "bfloat16"
    assert keep_precision(tmp_path / "new", "bfloat16") == "bfloat16"
    with pytest.raises(ValueError, match="This was begun in bfloat16, not float32"):
        keep_precision(tmp_path / "new", "float32")


def test_it_decides_both_dtypes(tmp_path, machine):
    flags = ["--base_model", "base", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    for products, chosen in ((SLOW_BF16, "float32"), (FAST_BF16, "bfloat16")):
        machine(products)
        for asked in ("fast", chosen):
            model, _, training = parse_recipe([*flags, "--precision", asked])
            assert (model.base_model_dtype, training.precision, training.bf16) == (chosen, chosen, chosen[0] == "b")
            assert training.mixed_precision == {"float32": "no", "bfloat16": "bf16"}[chosen]
    model, _, training = parse_recipe([*flags, "--bf16", "true", "--base_model_dtype", "float32"])
    assert (model.base_model_dtype, training.precision, training.bf16) == ("float32", None, True)


@pytest.mark.parametrize(
    ("flags", "launched", "complaint"),
    [
        (["--precision", "half"], "no", "`precision` must be one of"),
        (["--precision", "float32", "--bf16", "true"], "no", "`precision: float32` decides what `bf16: true` does"),
        (["--precision", "fast", "--bf16", "true"], "no", "`precision: fast` decides what `bf16: true` does"),
        (["--precision", "bfloat16", "--fp16", "true"], "no", "`precision: bfloat16` decides what `fp16: true` does"),
        (["--precision", "fast", "--base_model_dtype", "bfloat16"], "no", "decides what `base_model_dtype: bfloat16`"),
        (["--precision", "float32"], "bf16", "launcher asks for mixed precision bf16, but `precision` is float32"),
        (["--precision", "fast"], "fp16", "launcher asks for mixed precision fp16, but `precision` is bfloat16"),
    ],
)
def test_contradictions(tmp_path, machine, monkeypatch, flags, launched, complaint):
    """On a machine where nothing else would be wrong."""
    machine(FAST_BF16)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(ValueError, match=complaint):
        parse_recipe(["--base_model", "base", "--output_dir", str(tmp_path), "--use_cpu", "true", *flags])


def test_a_run_goes_on_in_its_precision(tmp_path, llama, make_trainer, machine):
    """On another machine, too, and when it is finished; one that starts anew takes what is fast there."""
    machine(FAST_BF16)
    trainer = make_trainer(llama, arguments(tmp_path, precision="fast"))
    trainer.train()
    trainer.save_model()
    for folder in (latest_checkpoint(tmp_path), tmp_path):
        assert json.loads((Path(folder) / "provenance.json").read_text())["arguments"]["precision"] == "bfloat16"
    machine(None)
    assert arguments(tmp_path, precision="fast").bf16
    assert arguments(tmp_path, precision="fast", resume_from_checkpoint=latest_checkpoint(tmp_path)).bf16
    machine(SLOW_BF16)
    anew = arguments(tmp_path, precision="fast", resume_from_checkpoint="false")
    assert (anew.precision, anew.bf16) == ("float32", False)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    machine(None)
    assert arguments(tmp_path, precision="fast").precision == "bfloat16"


def test_a_run_that_was_begun_without_the_key(tmp_path, llama, make_trainer, machine):
    for bf16, expected in ((True, "bfloat16"), (False, "float32")):
        make_trainer(llama, arguments(tmp_path / expected, bf16=bf16)).train()
        machine(None)
        assert arguments(tmp_path / expected, precision="fast").precision == expected


AGREE = """
import os, sys, torch
from accelerate import PartialState
from modeling_speculator import precision
from modeling_speculator.trainers import SpeculatorTrainingArguments
rates = {torch.float32: 1.0, torch.bfloat16: 1.0 if int(os.environ["RANK"]) else 9.0}
precision.measure_products = lambda device: rates
args = SpeculatorTrainingArguments(sys.argv[1], use_cpu=True, precision="fast")
open(f"{sys.argv[1]}/{args.process_index}.txt", "w").write(f"{args.precision} {args.mixed_precision}")
PartialState().destroy_process_group()
"""


def test_processes_agree(tmp_path):
    """The main process measures; what the others would have found does not count."""
    (tmp_path / "agree.py").write_text(AGREE)
    launch(tmp_path / "agree.py", tmp_path)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["bfloat16 bf16"] * 2


@pytest.mark.parametrize("path", sorted(RECIPES.glob("[qs][uw]*/stage*.yaml")), ids=lambda path: str(path)[-21:])
def test_recipes_for_small_machines_assume_no_dtype(path):
    recipe = yaml.safe_load(path.read_text())
    assert recipe["precision"] == "fast"
    assert not {"bf16", "fp16", "base_model_dtype"} & recipe.keys()
