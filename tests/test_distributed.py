"""Several processes train as one does: same losses, same metrics, same weights. CPU and gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from trainings import BF16, TRAININGS, speculator, train

from modeling_speculator.trainers import SpeculatorTrainer, SpeculatorTrainingArguments
from modeling_speculator.trainers.distribution import check_distribution


HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """Every training, launched as a user does."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command += [str(HERE / "trainings.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def launch(script, *arguments, **environment):
    """What it prints."""
    done = commands.launch(HERE / script, *arguments, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_equal(one, one_logs, other):
    other_logs = json.loads((other / "logs.json").read_text())
    assert [log.keys() for log in one_logs] == [log.keys() for log in other_logs]
    for mine, theirs in zip(one_logs, other_logs, strict=True):
        for key, value in mine.items():
            assert float(theirs[key]) == pytest.approx(float(value), rel=1e-4), key
    weights, other_weights = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == other_weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(other_weights[key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_are_one(tmp_path, of_two_processes, name):
    logs = train(tmp_path, 1, **TRAININGS[name])
    losses = [float(log["loss"]) for log in logs if "loss" in log]
    assert len(losses) == 4
    assert_equal(tmp_path, logs, of_two_processes / name)


def test_fsdp2(tmp_path):
    """The speculator's weights are shared out. (accelerate has FSDP for GPUs only; the script says it has some.)"""
    names = ["tied", "sharded base model", "stage 2"]
    settings = {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    output = launch("trainings_fsdp.py", tmp_path, *names, ACCELERATE_USE_FSDP="true", **settings)
    assert output.count("a share of the speculator") == 2 * len(names)
    for name in names:
        assert_equal(tmp_path / "one", train(tmp_path / "one", 1, **TRAININGS[name]), tmp_path / name)


def test_fsdp2_in_bf16(tmp_path):
    """Weights and products are; losses and counts are not."""
    settings = {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    settings |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "bf16"}
    output = launch("trainings_fsdp.py", tmp_path, "bf16", **settings)
    assert output.count("losses in torch.float32") == 2
    assert output.count("sums of gradients in torch.float32") == 2
    logs = train(tmp_path / "one", 1, **BF16)
    losses = [float(log["loss"]) for log in logs if "loss" in log]
    theirs = [float(log["loss"]) for log in json.loads((tmp_path / "bf16/logs.json").read_text()) if "loss" in log]
    assert theirs == pytest.approx(losses, rel=1e-2)


@pytest.mark.parametrize(("zero_stage", "name"), [("2", "stage 1"), ("3", "stage 1"), ("3", "stage 2")])
def test_deepspeed(tmp_path, zero_stage, name):
    pytest.importorskip("deepspeed", reason="needs `pip install deepspeed`")
    settings = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": zero_stage, "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
    settings |= {f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE": "none" for what in ("OPTIMIZER", "PARAM")}
    settings |= {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
    launch("trainings.py", tmp_path, name, ACCELERATE_USE_DEEPSPEED="true", DS_ACCELERATOR="cpu", **settings)
    assert_equal(tmp_path / "one", train(tmp_path / "one", 1, **TRAININGS[name]), tmp_path / name)


class Accelerator:
    """One process, as accelerate would report it."""

    num_processes = 1
    distributed_type = type("", (), {"value": "NO"})


def test_a_distribution_that_did_not_come_about(monkeypatch):
    """`accelerate launch --cpu --num_processes 2` runs one process; FSDP on a CPU is none."""
    with pytest.raises(ValueError, match="`num_processes=2`, but 1 are running.*torchrun"):
        check_distribution(Accelerator, 2)
    check_distribution(Accelerator, 1)
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED")):
        with monkeypatch.context() as context:
            context.setenv(variable, "true")
            with pytest.raises(ValueError, match=f"configured for {name}, but runs as NO"):
                check_distribution(Accelerator, None)


def test_one_process_can_not_shard(tmp_path):
    args = SpeculatorTrainingArguments(output_dir=str(tmp_path), use_cpu=True, shard_base_model=True)
    with pytest.raises(ValueError, match="several processes to shard over"):
        SpeculatorTrainer(speculator(), tiny_model("llama"), args)
