"""Serves MLP speculators in vLLM, by an entry point of its plugins: installed beside vLLM, there is nothing to import.

vllm serve BASE_MODEL --speculative-config '{"method": "mtp", "model": SPECULATOR, "num_speculative_tokens": 3}'

vLLM runs them as multi-token prediction: one module for each drafted position, which a speculator's heads are. What of
this is imported before vLLM asks for the network is `contract` and `configuration`, and nothing of
`modeling_speculator`, whose import changes transformers.
"""

import logging


logger = logging.getLogger(__name__)


def refusal() -> str | None:
    """Why the vLLM that is installed can't serve them; None where it can."""
    from .contract import missing

    if lacks := missing():
        lacks = ", ".join(lacks)
        return f"MLP speculators can't be served: this vLLM lacks {lacks}. vLLM 0.32 and 0.33 are known to work."
    return None


def register() -> None:
    """Makes vLLM know the checkpoints of speculators; called by vLLM in each of its processes."""
    if reason := refusal():
        logger.warning(reason)
        return
    from transformers import AutoConfig, AutoModel
    from vllm import ModelRegistry

    from .configuration import ARCHITECTURE, MODELS, ContextConfig
    from .contract import put_before_others

    put_before_others(ContextConfig)  # which says why
    for model in MODELS:
        config = model.config_class
        put_before_others(config)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.network:MLPSpeculator")
