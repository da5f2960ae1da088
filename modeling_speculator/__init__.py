"""MLP speculators for the Hugging Face libraries. Importing this registers the model type and the generation hook."""

from .configuration_mlp_speculator import MLPSpeculatorConfig
from .drafters import register_drafter
from .generation import install_generation_hook, remove_generation_hook
from .modeling_medusa import MedusaConfig, MedusaModel
from .modeling_mlp_speculator import MLPSpeculatorPreTrainedModel
from .statistics import SpeculationStatistics


install_generation_hook()

__all__ = [
    "MLPSpeculatorConfig",
    "MLPSpeculatorPreTrainedModel",
    "MedusaConfig",
    "MedusaModel",
    "SpeculationStatistics",
    "install_generation_hook",
    "register_drafter",
    "remove_generation_hook",
]
