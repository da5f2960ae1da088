"""What is relied on of vLLM, looked up by name: where a name is gone, nothing is registered."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path


# Modules that cost little to import, and what is used of them.
_NAMES = {
    "vllm": ("ModelRegistry",),
    "vllm.config": ("SpeculativeConfig", "VllmConfig"),
    "vllm.config.speculative": ("MTPModelTypes",),
}
# Those that need a device or a compiler to be imported, and what their source must hold.
_SOURCES = {
    "vllm.config.speculative": ('"mtp"', "num_nextn_predict_layers", "def use_multi_module_mtp"),
    "vllm.config.vllm": ("def use_v2_model_runner",),
    "vllm.model_executor.layers.logits_processor": ("class LogitsProcessor",),
    "vllm.model_executor.layers.vocab_parallel_embedding": ("class VocabParallelEmbedding", "class ParallelLMHead"),
    "vllm.model_executor.model_loader.weight_utils": ("def default_weight_loader",),
    "vllm.v1.worker.gpu.spec_decode.eagle.utils": ("has_own_embed_tokens", "has_own_lm_head", ".model"),
    "vllm.v1.worker.gpu.spec_decode.multi_module_mtp.speculator": ("spec_step_idx", "isinstance(ret_hidden_states"),
}


def missing() -> list[str]:
    """The names that this vLLM lacks."""
    lacks = []
    for module, names in _NAMES.items():
        try:
            found = import_module(module)
        except ImportError:
            lacks.append(module)
            continue
        lacks += [f"{module}.{name}" for name in names if not hasattr(found, name)]
    for module, texts in _SOURCES.items():
        source = _source_of(module)
        if source is None:
            lacks.append(module)
        else:
            lacks += [f"{text.removeprefix('def ')} in {module}" for text in texts if text not in source]
    return lacks


def _source_of(module: str) -> str | None:
    try:
        spec = find_spec(module)
    except ImportError:
        return None
    return Path(spec.origin).read_text() if spec and spec.origin else None


def put_before_others(config_class: type) -> None:
    """Among vLLM's own configs, which it registers anew whenever it reads a config.json: up to vLLM 0.32 it has one
    for the same type, and `modeling_speculator`, imported later, registers its own."""
    registry = getattr(import_module("vllm.transformers_utils.config"), "_CONFIG_REGISTRY", {})
    registry[config_class.model_type] = config_class
