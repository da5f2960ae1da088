"""Fixtures of all tests."""

from pathlib import Path

import pytest
import torch
from hub_server import Client, HubServer
from tiny_models import FAMILIES, tiny_model
from trainings import rows, speculator

from modeling_speculator.trainers import DistillationTrainer, SpeculatorTrainer


torch.set_num_threads(1)  # tiny models are faster so


@pytest.fixture(scope="session", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def llama():
    return tiny_model("llama")


@pytest.fixture
def shared() -> Path:
    """Real models and reference vectors beside the checkout."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared, which is not here")
    return folder


@pytest.fixture(scope="module")
def hub():
    """A small Hub of each file's own."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """A process of somebody who is logged in there."""
    client = Client(hub, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


STAGES = {"stage 1": (SpeculatorTrainer, {}), "stage 2": (DistillationTrainer, {"generation_length": 8})}


@pytest.fixture(params=STAGES)
def make_trainer(request):
    """Each stage's trainer, on random text where none is given."""
    trainer_class, options = STAGES[request.param]

    def make(base_model, args, model=None, **kwargs):
        kwargs = {"train_dataset": rows(16, 12), "eval_dataset": rows(4, 12, seed=1)} | options | kwargs
        return trainer_class(model=model or speculator(), base_model=base_model, args=args, **kwargs)

    return make
