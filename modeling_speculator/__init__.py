"""MLP speculators for the Hugging Face libraries. Importing this registers the model type and the generation hook."""

from .configuration_mlp_speculator import MLPSpeculatorConfig
from .drafters import DRAFTERS, register_drafter
from .families import register_family
from .generation import install_generation_hook, remove_generation_hook
from .loading import load_speculator_and_base
from .modeling_medusa import MedusaConfig, MedusaModel
from .modeling_mlp_speculator import MLPSpeculatorPreTrainedModel
from .modeling_prompt_lookup import PromptLookup
from .statistics import SpeculationStatistics


for _config_class, _model_class in DRAFTERS.items():
    register_drafter(_config_class, _model_class)
install_generation_hook()

__all__ = [
    "MLPSpeculatorConfig",
    "MLPSpeculatorPreTrainedModel",
    "MedusaConfig",
    "MedusaModel",
    "PromptLookup",
    "SpeculationStatistics",
    "install_generation_hook",
    "load_speculator_and_base",
    "register_drafter",
    "register_family",
    "remove_generation_hook",
]
