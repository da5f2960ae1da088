"""What is installed: one top-level name, whatever the folders of the repository are called."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path


ROOT = Path(__file__).parents[1]


def test_wheel_has_one_top_level_name(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"modeling_speculator"}
    assert "modeling_speculator/py.typed" in names
    for folder, package in (
        ("modeling_speculator", "modeling_speculator"),
        ("trainers", "modeling_speculator/trainers"),
        ("model_cards", "modeling_speculator/model_cards"),
    ):
        for path in [*(ROOT / folder).glob("*.py"), *(ROOT / folder).glob("*.md")]:
            assert f"{package}/{path.name}" in names


def test_library_does_not_import_the_trainers():
    code = "import modeling_speculator, sys; assert not any('trainers' in m for m in sys.modules if 'speculator' in m)"
    subprocess.run([sys.executable, "-c", code], check=True)
