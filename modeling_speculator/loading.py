"""A base model, its tokenizer and what drafts for it, loaded to where they run."""

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .checks import main_device
from .drafters import DRAFTERS


def load_base_model(name: str, dtype: str = "auto", device_map: str | None = None) -> tuple[PreTrainedModel, object]:
    """A base model, ready to generate, and its tokenizer.

    Args:
        name: folder or Hub id.
        device_map: of `from_pretrained`; by default all of the model is put on the first accelerator, or the CPU.
    """
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device_map).eval()
    if device_map is None:
        model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    return model, AutoTokenizer.from_pretrained(name)


def load_drafter(name: str, base_model: PreTrainedModel) -> PreTrainedModel:
    """A speculator, or a language model that drafts in transformers' own way, in the base model's dtype, beside it."""
    is_speculator = type(AutoConfig.from_pretrained(name)) in DRAFTERS
    auto = AutoModel if is_speculator else AutoModelForCausalLM
    return auto.from_pretrained(name, dtype=base_model.dtype).eval().to(main_device(base_model))
