"""Imports run one way: recipes -> trainers -> model_cards -> measuring -> what runs beside a model.

The doctor is a command above all rooms: nothing imports it.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = "modeling_speculator"
ROOMS = ["runtime", "measuring", "model_cards", "trainers", "recipes", "doctor"]  # each may need those before it
# A speculator's `push_to_hub` looks the publishing code up when it is called.
EXCEPTIONS = {f"{PACKAGE}.persistence": {f"{PACKAGE}.model_cards.publishing"}}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] in (PACKAGE, "recipes") else (PACKAGE, *parts)
    return ".".join(parts).removesuffix(".__init__")


FILES = {
    module_of(path): path
    for folder in (PACKAGE, "trainers", "model_cards", "recipes")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def room_of(module: str) -> str:
    if module.startswith("recipes."):
        return "recipes"
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "runtime"


def imports(tree: ast.AST, package: str) -> set[str]:
    """Modules of this project that a file names, in a statement or a string.

    Args:
        package: that the file lies in, which relative names begin from.
    """

    def absolute(name: str) -> str:
        level = len(name) - len(name.lstrip("."))
        parts = package.split(".")
        return ".".join([*parts[: len(parts) + 1 - level], *filter(None, [name.lstrip(".")])]) if level else name

    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                found |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=module, level=level, names=aliases):
                base = absolute("." * level + (module or ""))
                found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in aliases}
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(text)), *_]):
                if name in ("import_module", "__import__", "find_spec", "run_module") and text.startswith("."):
                    found.add(absolute(text))
            case ast.Constant(value=str(text)) if re.fullmatch(rf"{PACKAGE}(\.\w+)+", text):
                found.add(text if text in FILES else text.rpartition(".")[0])
    return {name for name in found if name.split(".")[0] in (PACKAGE, "recipes")}


def arrows_back(module: str, tree: ast.AST) -> set[str]:
    """What a file names of rooms that may need its own."""
    package = module if FILES.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    here = ROOMS.index(room_of(module))
    needed = imports(tree, package) - EXCEPTIONS.get(module, set())
    return {name for name in needed if ROOMS.index(room_of(name)) > here}


@pytest.mark.parametrize("module", FILES)
def test_no_arrow_runs_back(module):
    assert arrows_back(module, ast.parse(FILES[module].read_text())) == set()


@pytest.mark.parametrize(
    ("module", "code", "needed"),
    [
        ("decoding", "from .measuring.prompts import Prompt", "measuring.prompts"),
        ("decoding", "from .measuring import prompts", "measuring.prompts"),
        ("decoding", "from . import measuring", "measuring"),
        ("decoding", "def f():\n    import modeling_speculator.trainers.data", "trainers.data"),
        ("decoding", "import_module('.trainers', __package__)", "trainers"),
        ("decoding", "pytest.importorskip('modeling_speculator.model_cards')", "model_cards"),
        ("measuring.latency", "from ..model_cards import publish", "model_cards"),
        ("measuring.latency", "from ..trainers.texts import load_texts", "trainers.texts"),
        ("model_cards.publishing", "from ..trainers import pack", "trainers"),
    ],
)
def test_an_arrow_back_is_seen(module, code, needed):
    assert arrows_back(f"{PACKAGE}.{module}", ast.parse(code)) == {f"{PACKAGE}.{needed}"}


def test_the_exceptions_are_needed():
    for module, exceptions in EXCEPTIONS.items():
        assert exceptions <= imports(ast.parse(FILES[module].read_text()), PACKAGE)


def test_what_runs_beside_a_model_needs_no_other_room():
    """As in a repository on the Hub, which carries nothing else."""
    modules = [name for name in FILES if room_of(name) == "runtime"]
    code = f"""
import importlib, sys
class Closed:
    def find_spec(self, name, path=None, target=None):
        if name.startswith({tuple(f"{PACKAGE}.{room}" for room in ROOMS[1:])}):
            raise ImportError(name)
sys.meta_path.insert(0, Closed())
for module in {modules}:
    importlib.import_module(module)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
