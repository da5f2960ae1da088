"""What pytest is told. The environment is set before any test imports a library that reads it."""

import atexit
import os
import shutil
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a network
if "HF_DATASETS_CACHE" not in os.environ:  # a child process uses its parent's
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

# The files that take longest begin first, so that no worker waits for another in the end.
LONGEST = ("test_theorems.py", "test_static.py", "test_distributed.py", "test_benchmarks.py", "test_hub.py")


def pytest_configure(config) -> None:
    """A process that only hands out tests to workers needs none of what they import."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("common_fixtures")


def pytest_collection_modifyitems(items) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)  # stable: the others stay in their order
