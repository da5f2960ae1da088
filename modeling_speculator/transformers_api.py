"""The one room for what is private in transformers, accelerate and torch, or differs between supported releases.

Elsewhere only public names are used, and such as all these releases share. What is relied on is listed in `USED` and
`DEFINED`, and was checked against transformers 5.17.0, 5.20.2 and 5.24.0 with torch 2.13; `problems` compares that
list with what is installed. The functions in between are the only readers.
"""

import importlib.util
import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import cache, partial

import torch
import transformers
from packaging.version import Version
from transformers import CompileConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The first and the last of the releases that are supported; pyproject.toml names the same.
OLDEST, NEWEST = "5.17", "5.24"

# The cache as an argument of forward and `generate`, and as a field of outputs: `cache` since 5.24, `past_key_values`
# before. The old name goes on working there, with a warning that should not be of our making.
CACHE = "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "past_key_values"


# What is expected


@dataclass(frozen=True)
class Expected:
    """A name that nobody promised.

    Attributes:
        name: "module:Class.name", or "module:name".
        serves: what can't be done without it: "generate", "compile", "measure" or "train".
        takes: of a function, the parameters that are passed to it, or that its override here takes; None of others.
        stored_by: of an attribute of instances, the function that stores it there.
        since: the first of the checked releases that has it.
    """

    name: str
    serves: str
    takes: tuple[str, ...] | None = None
    stored_by: str | None = None
    since: str = OLDEST

    def problem(self) -> str | None:
        """What differs in the release that is installed; None where nothing does."""
        package = self.name if self.stored_by is None else self.stored_by
        is_installed = importlib.util.find_spec(package.split(".")[0].split(":")[0]) is not None
        if not is_installed or Version(transformers.__version__) < Version(self.since):
            return None
        try:
            found = _find(self.stored_by or self.name)
        except (AttributeError, ImportError) as error:
            return f"{self.name} is not there ({error})"
        if self.stored_by is not None:
            name = self.name.rpartition(".")[2]
            return None if name in inspect.unwrap(found).__code__.co_names else f"{self.stored_by} stores no `{name}`"
        return None if self.takes is None else self._problem_of(inspect.signature(found).parameters.values())

    def _problem_of(self, parameters: Iterable[inspect.Parameter]) -> str | None:
        """Whether a parameter is missing, in another place, or needed without being known."""
        parameters = [parameter for parameter in parameters if parameter.name != "self"]
        names = [parameter.name for parameter in parameters]
        many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = {part.name for part in parameters if part.default is part.empty and part.kind not in many}
        if [name for name in names if name in self.takes] == list(self.takes) and needed <= set(self.takes):
            return None
        return f"{self.name} takes ({', '.join(names)}), where ({', '.join(self.takes)}) was expected"


_MIXIN, _MODEL, _TRAINER = "transformers:GenerationMixin", "transformers:PreTrainedModel", "transformers:Trainer"
_LOOP = ("input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer")
_CONFIG = "transformers:GenerationConfig"
_PREFIX = "transformers.generation:PrefixConstrainedLogitsProcessor"

# Read, called or written by the functions below.
USED = (
    Expected(f"{_MIXIN}._prefill", "generate", ("input_ids", "generation_config", "model_kwargs")),
    Expected(f"{_MIXIN}._has_unfinished_sequences", "generate", ("this_peer_finished", "synced_gpus", "device")),
    Expected(f"{_MIXIN}._optimize_model_for_decode", "generate", ()),
    Expected(f"{_CONFIG}._pad_token_tensor", "generate", stored_by=f"{_MIXIN}._prepare_special_tokens"),
    Expected(f"{_CONFIG}._mask_length", "generate", stored_by=f"{_MIXIN}.generate", since="5.20"),
    Expected("transformers:Cache._is_user_defined", "generate", stored_by=f"{_MIXIN}._prepare_cache_for_generation"),
    Expected(f"{_PREFIX}._prefix_allowed_tokens_fn", "generate", stored_by=f"{_PREFIX}.__init__"),
    Expected("transformers:PreTrainedConfig._attn_implementation", "generate"),
    Expected(f"{_MODEL}._is_stateful", "generate"),
    Expected(f"{_MODEL}.is_gradient_checkpointing", "generate"),
    Expected("torch.nn:Module._hf_hook", "generate", stored_by="accelerate.hooks:add_hook_to_module"),
    Expected("torch.nn:Module._forward_pre_hooks", "generate", stored_by="torch.nn:Module.register_forward_pre_hook"),
    Expected("torch._dynamo:mark_static_address", "compile", ("t", "guard")),
    Expected("torch._dynamo.config:recompile_limit", "compile"),
    Expected("torch._dynamo.config:accumulated_recompile_limit", "compile"),
    Expected("torch._dynamo.exc:Unsupported", "compile"),
    Expected("torch._dynamo.exc:FailOnRecompileLimitHit", "compile"),
    Expected("transformers:CompileConfig._compile_all_devices", "measure"),
    Expected(f"{_MIXIN}._previous_max_cache_length", "measure", stored_by=f"{_MIXIN}._prepare_static_cache"),
    Expected(f"{_MODEL}._no_split_modules", "train"),
    Expected(f"{_TRAINER}._get_output_dir", "train", ("trial",)),
    Expected(f"{_TRAINER}._prepare_inputs", "train", ("inputs",)),
    Expected(f"{_TRAINER}._created_lr_scheduler", "train", stored_by=f"{_TRAINER}.__init__"),
    Expected("transformers:TrainingArguments._VALID_DICT_FIELDS", "train"),
    Expected("torch._subclasses.fake_tensor:FakeTensorMode", "train"),
    Expected("torch:UntypedStorage._cdata", "train"),
)

# Defined by classes of ours, for transformers to read or to call.
DEFINED = (
    Expected(
        f"{_MIXIN}._validate_generation_mode",
        "generate",
        ("generation_mode", "generation_config", "generation_mode_kwargs"),
    ),
    Expected(f"{_MIXIN}._assisted_decoding", "generate", (*_LOOP, "assistant_model")),
    Expected(f"{_MODEL}._init_weights", "generate", ("module",)),
    Expected(f"{_MODEL}._tied_weights_keys", "generate"),
    Expected(f"{_MODEL}._keys_to_ignore_on_load_unexpected", "generate"),
    Expected(f"{_TRAINER}.save_model", "train", ("output_dir", "_internal_call")),
    Expected(f"{_TRAINER}._save", "train", ("output_dir", "state_dict")),
    Expected(f"{_TRAINER}._save_checkpoint", "train", ("model", "trial")),
    Expected(f"{_TRAINER}._run_epoch", "train"),
    Expected(f"{_TRAINER}._push_from_checkpoint", "train", ("checkpoint_folder",)),
    Expected(f"{_TRAINER}._set_signature_columns_if_needed", "train", ()),
    Expected(f"{_TRAINER}._signature_columns", "train", stored_by=f"{_TRAINER}.__init__"),
)


def problems(serves: str | None = None) -> list[str]:
    """What differs from what is expected: of all names, or of those that serve one purpose."""
    entries = [entry for entry in USED + DEFINED if serves in (None, entry.serves)]
    return [problem for entry in entries if (problem := entry.problem()) is not None]


def is_tested() -> bool:
    """Whether the transformers that is installed is one of the releases that are supported."""
    release = Version(transformers.__version__).release[:2]
    return Version(OLDEST).release <= release <= Version(NEWEST).release


@cache
def check_contract(serves: str) -> None:
    """Compares, once a process, what a purpose relies on with what is installed.

    A release that was not tested is warned of.

    Raises:
        RuntimeError: where a name is missing or takes other parameters, and so nothing can be relied on.
    """
    what = f"transformers {transformers.__version__} (with torch {torch.__version__})"
    remedy = f"Install a release that this was tested with: pip install 'transformers>={OLDEST},<{_next(NEWEST)}'."
    found = problems(serves)
    if found:
        raise RuntimeError(f"Speculation relies on what {what} does not have: {'; '.join(found)}. {remedy}")
    if not is_tested():
        logger.warning(
            f"{what} was not tested, though all that speculation relies on is as expected. Compare an output with "
            f"plain `generate` (`python -m modeling_speculator.doctor --base_model ...` does). {remedy}"
        )


def _next(release: str) -> str:
    major, minor = release.split(".")
    return f"{major}.{int(minor) + 1}"


def _find(name: str):
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


# Generating


def prefill(model: PreTrainedModel, input_ids: torch.Tensor, generation_config, model_kwargs: dict, past):
    """Runs a prompt the model's own way into a cache, and returns the outputs of its last forward."""
    return model._prefill(input_ids, generation_config, model_kwargs | {CACHE: past})


def optimized_for_decoding(model: PreTrainedModel) -> AbstractContextManager:
    """Experts are computed meanwhile in the way that is fast for few tokens."""
    return model._optimize_model_for_decode()


def has_unfinished_sequences(model, finished: bool, synced_gpus: bool, device: torch.device) -> bool:
    """Whether to make another step: where models are sharded, other processes may need our forwards."""
    return model._has_unfinished_sequences(finished, synced_gpus, device)


def cache_of(outputs):
    """The cache in the outputs of a forward or of `generate`."""
    return getattr(outputs, CACHE)


def passed_cache(model_kwargs: dict):
    """Takes the cache out of what `generate` hands to a loop, and returns it where the caller passed it; else None."""
    past = model_kwargs.pop(CACHE, None)
    return past if getattr(past, "_is_user_defined", False) else None


def empty_cache(past) -> None:
    """Takes all tokens out of a cache. In 5.17 `reset` leaves layers that grow as long as they are, full of 0."""
    past.reset()
    for layer in past.layers:
        if isinstance(layer, DynamicLayer):
            layer.keys = layer.values = None
            layer.is_initialized = False


def mask_length(generation_config) -> int | None:
    """The length of a mask that `generate` dropped since it masked nothing (from 5.20 on); None where it did not."""
    return getattr(generation_config, "_mask_length", None)


def pad_token_id(generation_config) -> int:
    """What rows are padded with; 0 where there is no such token."""
    pad = generation_config._pad_token_tensor
    return 0 if pad is None else int(pad)


def attn_implementation(config: PreTrainedConfig) -> str:
    """The attention that a model with this config runs."""
    return config._attn_implementation


def set_attn_implementation(config: PreTrainedConfig, name: str) -> None:
    """Lets a model run another attention, without the checks of the model's own method for that."""
    config._attn_implementation = name


def is_stateful(model: PreTrainedModel) -> bool:
    """Whether a model has a recurrent state."""
    return model._is_stateful


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether activations are recomputed in training. The name changed after 5.20; the old one warns."""
    name = "is_activation_checkpointing"
    return getattr(model, name if hasattr(type(model), name) else "is_gradient_checkpointing")


def execution_device(module: torch.nn.Module) -> torch.device | int | str | None:
    """Where accelerate runs a module whose weights are elsewhere; None where it has no say in it."""
    return getattr(getattr(module, "_hf_hook", None), "execution_device", None)


def pre_hook_arguments(module: torch.nn.Module, name: str):
    """What peft hands to a layer under a name, for the time of a call, by a hook before its forward; None without."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, partial)]
    return next((hook.keywords[name] for hook in hooks if name in hook.keywords), None)


def prefix_allowed_tokens_fn(processor):
    """The caller's function, of a row's number and text, in a `PrefixConstrainedLogitsProcessor`."""
    return processor._prefix_allowed_tokens_fn


# Compiling


def mark_static_address(tensor: torch.Tensor) -> None:
    """Says that a tensor stays where it is: CUDA graphs then use it as it is, instead of a copy."""
    torch._dynamo.mark_static_address(tensor)


def recompile_limits(limit: int, accumulated: int) -> AbstractContextManager:
    """Compilations that a function may have meanwhile, by itself and with all that it calls."""
    from torch._dynamo import config

    return config.patch(recompile_limit=limit, accumulated_recompile_limit=accumulated)


def cant_be_compiled() -> tuple[type[Exception], ...]:
    """What a function raises, before any of it has run, that can't be compiled whole."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported

    return Unsupported, FailOnRecompileLimitHit


# Measuring


def compile_on_any_device() -> CompileConfig:
    """With which plain `generate` compiles on a CPU, too."""
    config = CompileConfig()
    config._compile_all_devices = True
    return config


def forget_static_cache(model: PreTrainedModel) -> None:
    """Else `generate` makes static caches as large as any before."""
    model._previous_max_cache_length = -1


# Training


def layer_classes(model: PreTrainedModel) -> set[str]:
    """Names of the classes of a model's layers, which stay on one device; empty where it does not say."""
    return set(model._no_split_modules or ())


def run_dir(trainer, trial) -> str:
    """The folder that a trainer's checkpoints lie in."""
    return trainer._get_output_dir(trial=trial)


def prepare_inputs(trainer, inputs: dict) -> dict:
    """A batch on the trainer's device."""
    return trainer._prepare_inputs(inputs)


def save_model_only(trainer) -> None:
    """Saves what is trained into the output folder, without pushing it."""
    trainer.save_model(_internal_call=True)


def own_lr_scheduler(trainer) -> None:
    """Lets a trainer take its schedule for one that it made, which it may make anew."""
    trainer._created_lr_scheduler = True


def dict_arguments() -> list[str]:
    """The training arguments whose values are dictionaries."""
    return transformers.TrainingArguments._VALID_DICT_FIELDS


def fake_tensors() -> AbstractContextManager:
    """Tensors have shapes and no memory meanwhile."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def storage_id(tensor: torch.Tensor) -> int:
    """Of a tensor's memory, fake or not, as long as it is alive."""
    return tensor.untyped_storage()._cdata
