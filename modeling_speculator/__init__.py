"""MLP speculators for the Hugging Face libraries. Importing this registers the model type and the generation hook."""

from transformers import AutoConfig, AutoModel

from .configuration_mlp_speculator import MLPSpeculatorConfig
from .generation import install_generation_hook, remove_generation_hook
from .modeling_mlp_speculator import MLPSpeculatorPreTrainedModel
from .statistics import SpeculationStatistics


AutoConfig.register(MLPSpeculatorConfig.model_type, MLPSpeculatorConfig, exist_ok=True)
AutoModel.register(MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel, exist_ok=True)
install_generation_hook()

__all__ = [
    "MLPSpeculatorConfig",
    "MLPSpeculatorPreTrainedModel",
    "SpeculationStatistics",
    "install_generation_hook",
    "remove_generation_hook",
]
