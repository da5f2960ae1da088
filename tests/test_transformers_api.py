"""What is private in transformers is read in one room, which says when it is not as expected."""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
from drafters import Oracle
from tiny_models import prompts
from transformers import GenerationMixin, Trainer

from modeling_speculator import transformers_api
from modeling_speculator.transformers_api import DEFINED, NEWEST, OLDEST, USED, Expected, check_contract


ROOT = Path(__file__).parents[1]
ROOM = ROOT / "modeling_speculator/transformers_api.py"
FOLDERS = ("modeling_speculator", "trainers", "model_cards", "recipes")
TREES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text())
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != ROOM
}
# Where transformers keeps what ours derive from or are handed.
_SOURCES = ("cache_utils", "configuration_utils", "core_model_loading", "generation.configuration_utils")
_SOURCES += ("generation.logits_process", "generation.utils", "hf_argparser", "modeling_utils", "trainer")
_SOURCES += ("trainer_utils", "training_args", "utils.hub")
THEIRS = {
    name
    for module in _SOURCES
    for name in re.findall(r"\b_[A-Za-z]\w*", inspect.getsource(import_module(f"transformers.{module}")))
}
# Public, but not the same in all releases. (`cache` as a keyword, too: before 5.24 it is none.)
DIFFERING = {"past_key_values", "cache_params", "is_activation_checkpointing", "is_gradient_checkpointing"}
STANDARD_LIBRARY = {"_asdict", "_actions"}  # of named tuples, of argument parsers


def last(name: str) -> str:
    return re.split(r"[.:]", name)[-1]


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def is_own_object(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        node = node.func
    return isinstance(node, ast.Name) and node.id in ("self", "cls", "super")


def defined_in(tree: ast.AST) -> set[str]:
    """Private names that a file defines: functions, classes, variables, and attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()) if is_own_object(node.value):
                names.add(name)
    return {name for name in names if is_private(name)}


def private_strings(nodes: list[ast.AST | None], allowed: set[str]) -> list[str]:
    values = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [value for value in values if is_private(value) and value not in allowed]


OWN = set().union(*map(defined_in, TREES.values()))


def trespasses(tree: ast.AST, own: set[str] = OWN) -> list[str]:
    """Uses of names that only the room may use, as "line: name"."""
    allowed = (own - THEIRS) | STANDARD_LIBRARY
    defined = {last(entry.name) for entry in DEFINED}
    found = []
    for node in ast.walk(tree):
        names = []
        match node:
            case ast.Attribute(attr=name):
                is_ours = name in allowed or (name in defined and is_own_object(node.value))
                names = [name] if (is_private(name) and not is_ours) or name in DIFFERING else []
            case ast.keyword(arg=str(name)):
                names = [name] if is_private(name) or name in DIFFERING | {"cache"} else []
            case ast.Constant(value=str(name)):
                names = [name] if name in DIFFERING else []
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"), args=[_, looked_up, *_]):
                names = private_strings([looked_up], allowed | defined)
            case ast.Dict(keys=keys):
                names = private_strings(keys, allowed | defined)
            case ast.Subscript(slice=key):
                names = private_strings([key], allowed | defined)
            case ast.Import(names=aliases):
                names = [part for alias in aliases for part in alias.name.split(".") if is_private(part)]
            case ast.ImportFrom(module=module, level=0):
                parts = [*(module or "").split("."), *(alias.name for alias in node.names)]
                names = [part for part in parts if is_private(part)]
        found += [f"{node.lineno}: {name}" for name in names]
    return found


@pytest.mark.parametrize("file", TREES)
def test_only_the_room_uses_what_is_private(file):
    assert trespasses(TREES[file]) == []


@pytest.mark.parametrize(
    "code",
    [
        "model._prefill(ids)",
        "model._save()",
        "getattr(config, '_mask_length', 3)",
        "model._something_new = 1",
        "from torch._dynamo import config",
        "import torch._subclasses",
        "torch._dynamo.reset()",
        "from transformers.trainer import _private",
        "cached_file(name, _raise_exceptions_for_missing_entries=False)",
        "model(ids, past_key_values=cache)",
        "model(ids, cache=cache)",
        "outputs.past_key_values",
        "{'past_key_values': cache}",
        "model.is_activation_checkpointing",
        "trainer.save_model(_internal_call=True)",
        "kwargs['_is_user_defined']",
        "class T(Trainer):\n    def f(self):\n        self._created_lr_scheduler = True",
    ],
)
def test_a_trespass_is_found(code):
    tree = ast.parse(code)
    assert trespasses(tree, OWN | defined_in(tree))


def test_what_classes_here_define_for_transformers_is_listed():
    """An override of a name that is private there, in the code or as an attribute."""
    listed = {last(entry.name) for entry in DEFINED}
    modules = [file[:-3].replace("/", ".") for file in TREES if not file.startswith("recipes")]
    modules = [name if name.startswith("modeling_speculator") else f"modeling_speculator.{name}" for name in modules]
    found = set()
    for module in map(import_module, (name.removesuffix(".__init__") for name in modules)):
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__:
                bases = [base for base in cls.__mro__ if base.__module__.startswith("transformers.")]
                theirs = set().union(*map(vars, bases))
                found |= {name for name in vars(cls) if is_private(name) and name in theirs}
    hidden = {"_abc_impl", "_is_protocol"}
    assert found - hidden <= listed
    assert {"_save", "_init_weights", "_assisted_decoding"} <= found


def test_everything_is_as_expected_here():
    assert transformers_api.problems() == []
    assert transformers_api.is_tested()


def test_the_releases_are_those_of_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    major, minor = NEWEST.split(".")
    assert f'"transformers>={OLDEST},<{major}.{int(minor) + 1}"' in text


@pytest.mark.parametrize(
    "entry, problem",
    [
        (Expected("transformers:GenerationMixin._prefill", "generate", ("input_ids", "model_kwargs")), "takes"),
        (Expected("transformers:GenerationMixin._prefill", "generate", ("model_kwargs", "input_ids")), "takes"),
        (Expected("transformers:GenerationMixin._gone", "generate"), "_gone is not there"),
        (Expected("transformers.gone:Thing._gone", "generate"), "_gone is not there"),
        (
            Expected("transformers:Trainer._gone", "train", stored_by="transformers:Trainer.__init__"),
            "stores no `_gone`",
        ),
    ],
)
def test_what_differs_is_named(entry, problem):
    assert problem in entry.problem()
    assert entry.name in entry.problem() or last(entry.name) in entry.problem()


def test_what_is_not_installed_or_not_there_yet_is_no_problem():
    assert Expected("a_package_that_is_not_there:x", "generate").problem() is None
    assert Expected("transformers:GenerationMixin._gone", "generate", since="99.0").problem() is None


@pytest.fixture
def anew():
    """As in a new process."""
    check_contract.cache_clear()
    yield
    check_contract.cache_clear()


@pytest.fixture
def calls(llama):
    """Forwards of the base model."""
    calls = []
    handle = llama.register_forward_pre_hook(lambda *args: calls.append(1))
    yield calls
    handle.remove()


def speculate(model, **options):
    inputs = prompts(1)
    drafter = Oracle(model, inputs["input_ids"])
    return model.generate(**inputs, assistant_model=drafter, max_new_tokens=4, do_sample=False, **options)


def test_a_missing_name_is_told_at_the_first_call_before_any_forward(llama, anew, calls, monkeypatch):
    calls.clear()
    monkeypatch.delattr(GenerationMixin, "_optimize_model_for_decode")
    with pytest.raises(RuntimeError, match=rf"_optimize_model_for_decode.*pip install 'transformers>={OLDEST}"):
        speculate(llama)
    assert not calls


def test_other_parameters_are_told_at_the_first_call(llama, anew, calls, monkeypatch):
    calls.clear()
    monkeypatch.setattr(GenerationMixin, "_prefill", lambda self, input_ids, config, model_kwargs: None)
    with pytest.raises(RuntimeError, match=r"_prefill takes \(input_ids, config, model_kwargs\), where"):
        speculate(llama)
    assert not calls


@pytest.mark.parametrize(
    "release, is_tested",
    [
        ("5.16.4", False),
        ("5.17.0", True),
        ("5.20.2", True),
        ("5.24.1", True),
        ("5.25.0.dev0", False),
        ("6.0.0", False),
    ],
)
def test_which_releases_were_tested(release, is_tested, monkeypatch):
    monkeypatch.setattr(transformers_api.transformers, "__version__", release)
    assert transformers_api.is_tested() == is_tested


def test_a_release_that_was_not_tested_is_warned_of_once(llama, anew, monkeypatch):
    warnings = []
    monkeypatch.setattr(transformers_api.logger, "warning", warnings.append)
    monkeypatch.setattr(transformers_api, "is_tested", lambda: False)
    plain = llama.generate(**prompts(1), max_new_tokens=4, do_sample=False)
    assert not warnings  # plain `generate` is not touched
    assert speculate(llama).tolist() == plain.tolist()
    speculate(llama)
    (warning,) = warnings
    assert transformers_api.transformers.__version__ in warning and "was not tested" in warning
    assert f"pip install 'transformers>={OLDEST},<" in warning


def test_a_trainer_asks_for_what_it_needs(anew, make_trainer, llama, tmp_path, monkeypatch):
    from modeling_speculator.trainers import SpeculatorTrainingArguments

    monkeypatch.delattr(Trainer, "_get_output_dir")
    with pytest.raises(RuntimeError, match="_get_output_dir is not there"):
        make_trainer(llama, SpeculatorTrainingArguments(output_dir=str(tmp_path)))


def test_what_training_needs_is_not_asked_for_by_generate(llama, anew, monkeypatch):
    monkeypatch.delattr(Trainer, "_get_output_dir")
    speculate(llama)


def test_every_entry_serves_something_that_is_asked_for():
    """By the hook, the compiled step, the trainers; measuring only changes how others are timed."""
    assert {entry.serves for entry in USED + DEFINED} == {"generate", "compile", "measure", "train"}


def calls_of_super() -> list[tuple[type, str, ast.Call]]:
    """Calls of what transformers defines and a class here overrides: the class, the method, the call."""
    found = []
    for file, tree in TREES.items():
        if file.startswith("recipes"):
            continue
        parts = Path(file).with_suffix("").parts
        parts = parts if parts[0] == "modeling_speculator" else ("modeling_speculator", *parts)
        module = import_module(".".join(parts).removesuffix(".__init__"))
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            for call in (call for call in ast.walk(node) if isinstance(call, ast.Call)):
                match call.func:
                    case ast.Attribute(value=ast.Call(func=ast.Name(id="super"), args=[]), attr=name):
                        found.append((getattr(module, node.name), name, call))
    return found


def test_what_is_handed_on_fits_the_installed_release():
    """Arguments of `super().method(...)`, where the method is public, and may have others in another release."""
    seen = set()
    for ours, name, call in calls_of_super():
        for user in [ours, *ours.__subclasses__()]:  # a mixin's next is its users'
            method = getattr(super(ours, user), name, None)
            if method is None or not getattr(method, "__module__", "").startswith("transformers"):
                continue
            if any(isinstance(part, ast.Starred) for part in call.args):
                continue
            given = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
            bound = list(inspect.signature(method).parameters)[:1] == ["self"]  # looked up in a class: not bound
            inspect.signature(method).bind_partial(*([None] * (len(call.args) + bound)), **given)
            seen.add((ours.__name__, name))
    assert ("PublishingTrainer", "init_hf_repo") in seen and ("WholeCheckpoints", "save_pretrained") in seen
