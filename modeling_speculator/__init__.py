"""MLP speculators for the Hugging Face libraries. Importing this registers the model type and the generation hook."""

from transformers import AutoConfig, AutoModel

from .configuration_mlp_speculator import MLPSpeculatorConfig
from .modeling_mlp_speculator import MLPSpeculatorPreTrainedModel


AutoConfig.register(MLPSpeculatorConfig.model_type, MLPSpeculatorConfig, exist_ok=True)
AutoModel.register(MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel, exist_ok=True)

__all__ = ["MLPSpeculatorConfig", "MLPSpeculatorPreTrainedModel"]
