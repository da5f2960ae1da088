"""The adapters of streams (LoRA, arXiv 2106.09685): as modules, as peft's files, and as peft's layers in a model."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .families import decoder_layers


FOLDER = "adapter"  # beside a speculator whose adapter is the main stream's, too
_SAME = 0.05  # relative to its size, how far a weight may be from itself in half precision


class LoRA(nn.Module):
    """`scale * B A x`, with the names that peft gives its weights; B starts at zero."""

    def __init__(self, n_in: int, n_out: int, rank: int, scale: float):
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out, bias=False)
        self.scale = scale

    def start(self) -> None:
        """As peft does: A by Kaiming, B at zero."""
        init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        init.zeros_(self.lora_B.weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., n_in) -> (..., n_out)."""
        weight = self.lora_A.weight
        return self.scale * self.lora_B(self.lora_A(inputs.to(weight.device, weight.dtype)))


def key_of(name: str) -> str:
    """The name of a linear layer as that of a module: without dots."""
    return name.replace(".", "-")


def path_of_layers(base_model: PreTrainedModel) -> str:
    """Where a base model keeps its layers: "model.layers"."""
    layers = decoder_layers(base_model)
    return next(name for name, part in base_model.named_modules() if part is layers)


def save_as_peft(
    folder: Path, weights: Mapping[tuple[str, str], torch.Tensor], scale: float, base_model: str | None
) -> None:
    """Writes an adapter that peft and transformers load.

    Args:
        weights: by the name of the linear layer in the base model, and "lora_A" or "lora_B".
        scale: of the adapter.
        base_model: its name.
    """
    rank = next(len(weight) for (_, part), weight in weights.items() if part == "lora_A")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": scale * rank}
    config |= {"lora_dropout": 0.0, "bias": "none", "inference_mode": True, "base_model_name_or_path": base_model}
    config |= {"target_modules": sorted({name for name, _ in weights})}
    named = {
        f"base_model.model.{name}.{part}.weight": weight.detach().cpu().contiguous().clone()
        for (name, part), weight in weights.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def runs_with(linear: nn.Module, lora: LoRA) -> bool:
    """Whether a linear layer of a base model has an adapter of peft that acts now, and is this one."""
    if getattr(linear, "disable_adapters", True):  # and where peft has put none
        return False
    acting = linear.merged_adapters if linear.merged else linear.active_adapters
    for name in acting:
        if name not in getattr(linear, "lora_A", {}) or getattr(linear, "use_dora", {}).get(name):
            continue
        pairs = ((linear.lora_A[name], lora.lora_A), (linear.lora_B[name], lora.lora_B))
        same_scale = math.isclose(linear.scaling[name], lora.scale, rel_tol=1e-3)
        if same_scale and all(_is_same(theirs.weight, ours.weight) for theirs, ours in pairs):
            return True
    return False


def _is_same(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    if theirs.shape != ours.shape:
        return False
    ours = ours.to(theirs.device).float()
    return bool((theirs.float() - ours).norm() <= _SAME * ours.norm())


__all__ = ["FOLDER", "LoRA", "key_of", "path_of_layers", "runs_with", "save_as_peft"]
