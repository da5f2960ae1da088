"""A recipe: one flat YAML file a stage, every key also a `--key value` flag; and what `--help` shows of the keys."""

import argparse
import copy
import difflib
import json
import re
from dataclasses import fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from ..command_line import HelpFormatter
from ..transformers_api import dict_arguments
from .precision import base_model_dtype
from .training_args import DataArguments, ModelArguments, SpeculatorTrainingArguments


_CLASSES = (ModelArguments, DataArguments, SpeculatorTrainingArguments)
_KNOWN = {field.name for cls in _CLASSES for field in fields(cls) if field.init}
_OF_TRANSFORMERS = {field.name: field.metadata.get("help") for field in fields(TrainingArguments) if field.init}
_OURS = {  # what `--help` shows, by groups
    "model": [field.name for field in fields(ModelArguments)],
    "data": [field.name for field in fields(DataArguments)],
    "speculator training": [
        field.name for field in fields(SpeculatorTrainingArguments) if field.name not in _OF_TRANSFORMERS
    ],
}
_ALL = _OURS | {"training, of transformers' TrainingArguments": [*_OF_TRANSFORMERS]}
_USAGE = """usage: %(prog)s --config FILE [--key value ...]

Every key of a YAML is a flag, too, and a flag wins; null in a YAML is the default. So is every option of transformers'
TrainingArguments: output_dir, max_steps, per_device_train_batch_size, learning_rate, logging_steps, report_to, ...
--help_all shows those, too."""


class _HelpAll(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help(_ALL))
        parser.exit()


class _RecipeParser(HfArgumentParser):
    """Its help has groups: what is this project's, and only where all is asked for, what is transformers'."""

    def __init__(self, description: str | None = None):
        super().__init__(_CLASSES, allow_abbrev=False, description=description, formatter_class=HelpFormatter)
        no_value = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        self.add_argument("--help_all", action=_HelpAll, nargs=0, help="show all options", **no_value)
        self.add_argument("--config", metavar="FILE", help="the recipe, a YAML (default: flags alone)", **no_value)

    def error(self, message: str):
        raise ValueError(f"{message}. See `--help` for all keys.")

    def format_help(self, groups: dict[str, list[str]] = _OURS) -> str:
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_text(_USAGE)
        formatter.add_text(self.description)
        by_name = {}
        for action in self._actions:
            by_name.setdefault(action.dest, []).append(action)
        sections = {"options": [*by_name["help"], *by_name[argparse.SUPPRESS]]}
        sections |= {title: [_one_spelling(by_name[name][0]) for name in names] for title, names in groups.items()}
        for title, actions in sections.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()


def _one_spelling(action: argparse.Action) -> argparse.Action:
    """An option as it is written in a YAML, too."""
    shown = copy.copy(action)
    shown.option_strings = action.option_strings[:1]
    shown.help = action.help or _OF_TRANSFORMERS[action.dest]  # which a default of ours leaves out
    if not action.required and action.default is None and "(default: " not in shown.help:
        shown.help += " (default: null)"
    if action.type is string_to_bool:
        shown.metavar = "true|false"
    return shown


def parse_recipe(
    args: list[str], description: str | None = None
) -> tuple[ModelArguments, DataArguments, SpeculatorTrainingArguments]:
    """Parses `--config recipe.yaml --key value ...`; a flag wins over the file.

    Args:
        description: of the command, for its `--help`.

    Raises:
        ValueError: for a key that does not exist (the nearest one is named), for a value of another type, and for keys
            that contradict each other.
    """
    parser = _RecipeParser(description)
    flags = {option: action for action in parser._actions for option in action.option_strings}

    args, path = split_config(args)
    recipe = {} if path is None else read_recipe(path)
    for at, arg in reversed(list(enumerate(args))):
        if arg.startswith("--") and arg not in ("--help", "--help_all"):
            key, _, value = arg[2:].partition("=")
            key = key.replace("-", "_")
            if f"--{key}" in flags and key not in _KNOWN:  # of a switch: no_...
                key = key.removeprefix("no_")
            _check_key(key, "the command line")
            recipe.pop(key, None)
            if value == "null" or (not value and args[at + 1 : at + 2] == ["null"]):
                args[at : at + (1 if value else 2)] = []

    for key, value in recipe.items():
        if value is False and "no" in (flags[f"--{key}"].choices or ()):
            value = "no"  # which YAML takes for false
        args = _as_flags(key, value, takes_list=flags[f"--{key}"].nargs == "+") + args
    *parsed, unknown = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"Values without a key: {unknown}. Options are written `--key value`.")
    model, _, training = parsed
    if training.precision is not None:
        model.base_model_dtype = base_model_dtype(training.precision, model.base_model_dtype)
    return tuple(parsed)


def split_config(args: list[str]) -> tuple[list[str], str | None]:
    """A command line without its `--config FILE` or `--config=FILE`, and that file."""
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" not in args:
        return args, None
    at = args.index("--config")
    if at + 1 == len(args):
        raise ValueError("`--config` needs the path of a YAML file.")
    return args[:at] + args[at + 2 :], args[at + 1]


def read_recipe(path: str) -> dict:
    """The keys of a YAML file that are set; null means unset, the default.

    Raises:
        ValueError: for a file that is none, and for keys that do not exist or are given twice.
    """
    if not Path(path).is_file():
        raise ValueError(f"`--config {path}`: there is no such file.")
    recipe = yaml.load(Path(path).read_text(), Loader=_RecipeLoader)
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold `key: value` lines.")
    for key in recipe:
        _check_key(key, path)
    return {key: value for key, value in recipe.items() if value is not None}


def _as_flags(key: str, value, takes_list: bool) -> list[str]:
    """A line of YAML as the flags that say the same, so that both are converted and checked by one parser."""
    if isinstance(value, dict) and key in dict_arguments():
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, list) and takes_list and not any(isinstance(item, (dict, list)) for item in value):
        return [f"--{key}", *map(str, value)]
    if isinstance(value, (dict, list)):
        raise ValueError(f"`{key}` takes {'a flat list' if takes_list else 'one value'}, but is {value}.")
    return [f"--{key}={value}"]


def _check_key(key: str, where: str) -> None:
    if key not in _KNOWN:
        nearest = difflib.get_close_matches(str(key), _KNOWN, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else " See `--help` for all keys."
        raise ValueError(f"Unknown key {key!r} in {where}.{hint}")


class _RecipeLoader(yaml.SafeLoader):
    """YAML that knows 1e-3 to be a number, and refuses a key that is given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise ValueError(f"Keys given twice: {sorted(twice)}. Keep one of each.")
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
