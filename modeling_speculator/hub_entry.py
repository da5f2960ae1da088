"""Where the code begins that a repository on the Hub carries: what `auto_map` and `generate.py` there name.

All files that are imported from here, directly or not, are sent along; none of them may need one that is not.
"""

from .drafters import (
    ContextConfig,
    ContextSpeculator,
    EagleConfig,
    EagleSpeculator,
    HydraConfig,
    HydraModel,
    MedusaConfig,
    MedusaModel,
    MLPSpeculatorConfig,
    MLPSpeculatorPreTrainedModel,
    ReDrafterConfig,
    ReDrafterModel,
    ResidualConfig,
    ResidualSpeculator,
    StreamingConfig,
    StreamingSpeculator,
    UnconditionedConfig,
    UnconditionedSpeculator,
)
from .generation import generation_hook


__all__ = [
    "ContextConfig",
    "ContextSpeculator",
    "EagleConfig",
    "EagleSpeculator",
    "HydraConfig",
    "HydraModel",
    "MLPSpeculatorConfig",
    "MLPSpeculatorPreTrainedModel",
    "MedusaConfig",
    "MedusaModel",
    "ReDrafterConfig",
    "ReDrafterModel",
    "ResidualConfig",
    "ResidualSpeculator",
    "StreamingConfig",
    "StreamingSpeculator",
    "UnconditionedConfig",
    "UnconditionedSpeculator",
    "generation_hook",
]
