"""What is installed: two top-level names, and all that lies in the folders of the repository."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import stand_in_vllm


ROOT = Path(__file__).parents[1]
FOLDERS = {
    "modeling_speculator": "modeling_speculator",
    "trainers": "modeling_speculator.trainers",
    "model_cards": "modeling_speculator.model_cards",
    "serving/vllm": "modeling_speculator_vllm",
}


def dotted(folder: str, path: Path) -> str:
    """The package that a file lies in."""
    return ".".join([FOLDERS[folder], *path.parent.relative_to(ROOT / folder).parts])


MODULES = {
    f"{dotted(folder, path)}.{path.stem}".removesuffix(".__init__"): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_every_folder_is_a_package():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(packages) == sorted({dotted(folder, p) for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")})


def test_the_wheel_holds_every_file(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{dotted(folder, path).replace('.', '/')}/{path.name}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".html", ".typed") and "__pycache__" not in path.parts
    }
    assert names == expected


def test_every_module_is_imported_from_the_wheel(wheel, tmp_path):
    """From an empty folder: where the repository is installed, a forgotten package would be found there."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"""
import importlib, sys
sys.path[:0] = [{str(tmp_path)!r}, {str(stand_in_vllm.write(tmp_path / "stand_in"))!r}]
for module in {list(MODULES)}:
    found = importlib.import_module(module).__file__
    assert found.startswith({str(tmp_path)!r}), (module, found)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
