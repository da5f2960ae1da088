"""A `vllm` of the few names that the plugin uses, where the real one is not installed: one rank, plain layers.

Called as a function, `write(folder)`, it makes a package there.
"""

from pathlib import Path


_FILES = {
    "__init__.py": """
class ModelRegistry:
    models = {}

    @classmethod
    def register_model(cls, name, where):
        cls.models[name] = where
""",
    "config/__init__.py": """
from .speculative import SpeculativeConfig
from .vllm import VllmConfig
""",
    "config/speculative.py": """
from typing import Literal
MTPModelTypes = Literal["mtp"]
class SpeculativeConfig:
    def use_multi_module_mtp(self):
        return self.hf_config.num_nextn_predict_layers > 1
""",
    "config/vllm.py": """
class VllmConfig:
    def use_v2_model_runner(self): ...
""",
    "transformers_utils/__init__.py": "",
    "transformers_utils/config.py": "_CONFIG_REGISTRY = {'mlp_speculator': 'its own', 'other': 'kept'}",
    "model_executor/__init__.py": "",
    "model_executor/layers/__init__.py": "",
    "model_executor/layers/logits_processor.py": """
class LogitsProcessor:
    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
    def __call__(self, lm_head, hidden_states, embedding_bias=None):
        logits = hidden_states @ lm_head.weight.T
        return logits if embedding_bias is None else logits + embedding_bias
    def get_top_tokens(self, lm_head, hidden_states, embedding_bias=None):
        return self(lm_head, hidden_states, embedding_bias).argmax(-1)
""",
    "model_executor/layers/vocab_parallel_embedding.py": """
import torch
class VocabParallelEmbedding(torch.nn.Embedding):
    def __init__(self, num_embeddings, embedding_dim):
        super().__init__(num_embeddings, embedding_dim)
class ParallelLMHead(torch.nn.Module):
    def __init__(self, num_embeddings, embedding_dim, prefix=""):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(num_embeddings, embedding_dim))
""",
    "model_executor/model_loader/__init__.py": "",
    "model_executor/model_loader/weight_utils.py": """
def default_weight_loader(param, loaded_weight):
    assert param.size() == loaded_weight.size()
    param.data.copy_(loaded_weight)
""",
    "v1/__init__.py": "",
    "v1/worker/__init__.py": "",
    "v1/worker/gpu/__init__.py": "",
    "v1/worker/gpu/spec_decode/__init__.py": "",
    "v1/worker/gpu/spec_decode/eagle/__init__.py": "",
    "v1/worker/gpu/spec_decode/eagle/utils.py": "# has_own_embed_tokens, has_own_lm_head, eagle_model.model",
    "v1/worker/gpu/spec_decode/multi_module_mtp/__init__.py": "",
    "v1/worker/gpu/spec_decode/multi_module_mtp/speculator.py": "# spec_step_idx, isinstance(ret_hidden_states, ...",
}


def write(folder: Path) -> Path:
    """The folder, for `sys.path`."""
    for name, content in _FILES.items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder
