"""A base model, its tokenizer and what drafts for it, loaded to where they run."""

from pathlib import Path

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .checks import main_device
from .configuration_mlp_speculator import MLPSpeculatorConfig
from .drafters import DRAFTERS


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
        ValueError: where the speculator does not say what it was trained for, or, downloaded, names a path.
    """
    config = AutoConfig.from_pretrained(name, revision=revision)
    base_name = getattr(config, "base_model_name_or_path", None)
    if not base_name:
        raise ValueError(
            f"{name} does not say which base model it is for (`base_model_name_or_path`): load both apart."
        )
    if not Path(name).is_dir() or hasattr(config, "auto_map"):  # downloaded, or a copy of what was pushed
        check_is_hub_id(base_name, name)
    base_model, tokenizer = load_base_model(base_name, dtype, device_map, getattr(config, "base_model_revision", None))
    return load_drafter(name, base_model, revision), base_model, tokenizer


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
    """
    options = {"dtype": dtype, "device_map": device_map, "revision": revision}
    model = AutoModelForCausalLM.from_pretrained(name, **options).eval()
    if device_map is None:
        model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    return model, AutoTokenizer.from_pretrained(name, revision=revision)


def load_drafter(name: str, base_model: PreTrainedModel, revision: str | None = None) -> PreTrainedModel:
    """A speculator, or a language model that drafts in transformers' own way, in the base model's dtype, beside it."""
    is_speculator = type(AutoConfig.from_pretrained(name, revision=revision)) in DRAFTERS
    auto = AutoModel if is_speculator else AutoModelForCausalLM
    drafter = auto.from_pretrained(name, dtype=base_model.dtype, revision=revision).eval()
    if isinstance(drafter.config, MLPSpeculatorConfig):
        drafter.config.take_special_tokens(base_model.config)
    return drafter.to(main_device(base_model))
