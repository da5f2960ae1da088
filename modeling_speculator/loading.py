"""A base model, its tokenizer and what drafts for it, loaded to where they run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, find_adapter_config_file

from .checks import main_device
from .configuration_mlp_speculator import MLPSpeculatorConfig
from .drafters import DRAFTERS
from .modeling_prompt_lookup import PromptLookup
from .published_drafters import find_published
from .stream_adapters import FOLDER as ADAPTER


# Why a name that is no folder is no model of the Hub either: the first of these that caused the error.
_REASONS = (
    (HFValidationError, "it is no name that a model of the Hub could have"),
    (GatedRepoError, "on the Hub it is gated: ask for access on its page there, and log in (`hf auth login`)"),
    (RepositoryNotFoundError, "the Hub has no such model that you may see (a private one: `hf auth login`)"),
    (RevisionNotFoundError, "the model of that name on the Hub has no such revision"),
    (LocalEntryNotFoundError, "the Hub, where it may be, can't be reached"),
)


def load_speculator_and_base(
    name: str, revision: str | None = None, dtype: str = "auto", device_map: str | None = None
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """A speculator, the base model that it was trained for, and their tokenizer, ready to generate.

    Args:
        name: folder or Hub id of the speculator.
        revision: version (a tag, as "v1.0.0"), branch or commit of the speculator.
        dtype: of both; by default as the base model was saved.
        device_map: of `from_pretrained`; by default all of the base model is put on the first accelerator, or the CPU.

    Raises:
        ValueError: where one of the two can't be found or is no such model, or the speculator does not say what it was
            trained for, or, downloaded, names a path.
    """
    published = find_published(name, revision)
    config = None if published else speculator_config(name, revision)
    base_name = published.base_model_name if published else config.base_model_name_or_path
    if not base_name:
        raise ValueError(
            f"{name} does not say which base model it is for (`base_model_name_or_path`): load both apart."
        )
    if not Path(name).is_dir() or published or hasattr(config, "auto_map"):  # downloaded, or a copy of what was pushed
        check_is_hub_id(base_name, name)
    base_revision = None if published else config.base_model_revision
    base_model, tokenizer = load_base_model(base_name, dtype, device_map, base_revision)
    if getattr(config, "shared_adapter", False):
        folder = name if Path(name).is_dir() else snapshot_download(name, revision, allow_patterns=f"{ADAPTER}/*")
        base_model.load_adapter(str(Path(folder) / ADAPTER))
        base_model.eval()
    return load_speculator(name, base_model, revision), base_model, tokenizer


def check_is_hub_id(base_name: str, speculator: str) -> None:
    """Raises a ValueError where what a downloaded config calls its base model is, or could be, a folder here."""
    try:
        validate_repo_id(base_name)
        is_path = Path(base_name).exists()
    except HFValidationError:
        is_path = True
    if is_path:
        raise ValueError(
            f"The speculator {speculator} names {base_name!r} as its base model, which is a path, not a model of the "
            "Hub. Load both models apart, if you know which one it means."
        )


def load_base_model(
    name: str, dtype: str = "auto", device_map: str | None = None, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model, ready to generate, and its tokenizer.

    Args:
        name: folder or Hub id.
        device_map: of `from_pretrained`; by default all of the model is put on the first accelerator, or the CPU.

    Raises:
        ValueError: where there is no such model, it is none that continues text, or it has no tokenizer.
    """
    base_model_config(name, revision)
    check_dtype(dtype)
    tokenizer = load_tokenizer(name, revision)
    options = {"dtype": dtype, "device_map": device_map, "revision": revision}
    with _whole_weights(name):
        model = AutoModelForCausalLM.from_pretrained(name, **options).eval()
    if device_map is None:
        model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    return model, tokenizer


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A base model's tokenizer.

    Raises:
        ValueError: where none can be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:  # transformers raises either, at some length
        if (adapted := _adapted_by(name, revision)) is not None:  # whose tokenizer it is
            return load_tokenizer(adapted)
        raise ValueError(
            f"{name} holds no tokenizer, or one that needs a package which is not here (sentencepiece, tiktoken). "
            "Save the base model's there: `tokenizer.save_pretrained(...)`."
        ) from error


def load_speculator(name: str, base_model: PreTrainedModel, revision: str | None = None) -> PreTrainedModel:
    """A speculator, in the base model's dtype, beside it: of this package, or as `published_drafters` knows it.

    Raises:
        ValueError: where there is no such speculator.
    """
    if published := find_published(name, revision):
        speculator = published.beside(base_model).to(main_device(base_model), base_model.dtype)
    else:
        speculator_config(name, revision)
        speculator = _load_beside(base_model, AutoModel, name, revision)
    if isinstance(speculator.config, MLPSpeculatorConfig):  # and no drafter of somebody's own
        speculator.config.take_special_tokens(base_model.config)
    return speculator


def load_speculator_or_lookup(name: str, base_model: PreTrainedModel) -> PreTrainedModel | PromptLookup:
    """`load_speculator`; by the name "lookup" prompt lookup, which has no weights."""
    return PromptLookup() if name == "lookup" else load_speculator(name, base_model)


def load_drafter(name: str, base_model: PreTrainedModel, revision: str | None = None) -> PreTrainedModel:
    """A speculator, or a language model that drafts in transformers' own way, in the base model's dtype, beside it.

    Raises:
        ValueError: where there is neither by that name.
    """
    if find_published(name, revision) or type(config_of(name, revision)) in DRAFTERS:
        return load_speculator(name, base_model, revision)
    base_model_config(name, revision)
    return _load_beside(base_model, AutoModelForCausalLM, name, revision)


def _load_beside(base_model: PreTrainedModel, auto: type, name: str, revision: str | None) -> PreTrainedModel:
    with _whole_weights(name):
        drafter = auto.from_pretrained(name, dtype=base_model.dtype, revision=revision).eval()
    return drafter.to(main_device(base_model))


def base_model_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of a base model, without its weights.

    Raises:
        ValueError: where there is no such model, or it is none that continues text.
    """
    config = config_of(name, revision)
    if type(config) in DRAFTERS:
        raise ValueError(f"{name} is a speculator, not a base model to draft for.")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{name} is a model of type {config.model_type!r}, none that continues text.")
    return config


def speculator_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of a speculator, without its weights.

    Raises:
        ValueError: where there is no such model, or it is no speculator.
    """
    if find_published(name, revision):
        raise ValueError(
            f"{name} is no speculator in this package's form, which is needed here: recipes/convert.py "
            "--to modeling_speculator writes it so."
        )
    config = config_of(name, revision)
    if type(config) not in DRAFTERS:
        raise ValueError(f"{name} is a model of type {config.model_type!r}, no speculator.")
    return config


def config_of(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of a model; of an adapter, that of the model that it adapts.

    Args:
        name: folder or Hub id.

    Raises:
        ValueError: in one sentence, where there is no such model here or on the Hub.
    """
    folder = Path(name)
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_dir() and not files & {CONFIG_NAME, ADAPTER_CONFIG_NAME}:
        raise ValueError(
            f"{name} holds no model (no {CONFIG_NAME})."
            + (" Its training has not ended: start it again, it goes on." if _has_checkpoints(files) else "")
        )
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except ValueError:
        adapted = _adapted_by(name, revision)
        if adapted is None:
            raise
        return config_of(adapted)
    except OSError as error:
        if folder.is_dir():
            raise
        raise ValueError(f"There is no folder {name!r} here, and {_why_not_on_the_hub(error)}.") from error


def _adapted_by(name: str, revision: str | None) -> str | None:
    """The model that an adapter is for; None of what is no adapter."""
    if find_adapter_config_file(name, revision=revision) is None:
        return None
    adapted = PeftConfig.from_pretrained(name, revision=revision).base_model_name_or_path
    if adapted is None:
        raise ValueError(f"{name} is an adapter that does not say for which model.")
    return adapted


def _has_checkpoints(files: set[str]) -> bool:
    return any(name.startswith("checkpoint-") for name in files)


def _why_not_on_the_hub(error: BaseException) -> str:
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    reasons = (reason for kind, reason in _REASONS if any(isinstance(cause, kind) for cause in causes))
    return next(reasons, f"the Hub's answer was: {' '.join(str(error).split())}")


def check_dtype(name: str) -> None:
    """Raises a ValueError for what is not the name of a dtype that weights can have."""
    dtype = getattr(torch, name, None)
    if name != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f'A dtype is "auto", "float32", "bfloat16" or "float16", not {name!r}.')


@contextmanager
def _whole_weights(name: str) -> Iterator[None]:
    """Says which model it is whose weights, read meanwhile, are damaged."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {name} can't be read ({error}): a file is cut off or damaged. Copy or download it again."
        ) from error
