"""Fixtures. The environment is set before any test imports a library that reads it."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a network
if "HF_DATASETS_CACHE" not in os.environ:  # a child process uses its parent's
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest
import torch
from tiny_models import FAMILIES, tiny_model


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
