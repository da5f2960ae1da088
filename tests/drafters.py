"""Drafters whose guesses are known, to stand in for a speculator."""

import torch

from modeling_speculator.measuring.evaluation import starts_of_drafts
from modeling_speculator.measuring.oracle import Oracle
from modeling_speculator.modeling_context import ContextConfig, ContextSpeculator
from modeling_speculator.modeling_eagle import EagleConfig, EagleSpeculator
from modeling_speculator.modeling_hydra import HydraConfig, HydraModel
from modeling_speculator.modeling_streaming import StreamingConfig, StreamingSpeculator


def oracle_for(model, inputs, text, **options):
    """An oracle for what a model makes of the inputs that `tiny_models.prompts` returns."""
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, text.shape[1] - 9), value=1)
    return Oracle(model, text, mask, **{"p_right": 0.7} | options)


class OracleWithContext(Oracle):
    """An oracle that finds its place by what a context layer makes of the text.

    Attributes:
        distances: of each draft and row, how far what it starts from is from any that the whole text, read at once,
            gives after the same token; of a row that has ended without meaning.
    """

    reads_text = reads_prompt = True

    def __init__(self, model, speculator, text, attention_mask=None, **options):
        super().__init__(model, text, attention_mask, **options)
        self.bound = speculator.beside(model)
        self.config.feature_layers = getattr(speculator.config, "feature_layers", [])
        mask = torch.ones_like(text) if attention_mask is None else attention_mask
        self.context_vectors = starts_of_drafts(model, speculator, text, mask)
        self.distances = []

    def start(self, call):
        return self.bound.start(call)

    def guest_slots(self, max_nodes):
        return self.bound.guest_slots(max_nodes)

    def guests_allowed(self):
        return self.bound.guests_allowed()

    def generate_candidates(self, hidden_states, input_ids, n_candidates=None):
        distance = (self.context_vectors - hidden_states).norm(dim=-1)
        follows = self.text[:, 1 : 1 + distance.shape[1]] == input_ids
        self.distances.append(distance.masked_fill(~follows, torch.inf).amin(-1).tolist())
        return super().generate_candidates(hidden_states, input_ids, n_candidates)


def eagle_speculator(base_model, **config):
    """An EAGLE layer whose weights are far from where they start."""
    torch.manual_seed(0)
    shape = base_model.config.get_text_config(decoder=True)
    sizes = {"vocab_size": shape.vocab_size, "emb_dim": shape.hidden_size, "n_predict": 3, "context_heads": 2}
    speculator = EagleSpeculator(EagleConfig(**sizes | config)).eval()
    speculator.speculator.start_from(base_model)
    with torch.no_grad():
        for weight in speculator.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return speculator


def eagle3_speculator(base_model, **config):
    """One that reads features of two layers, and has fewer heads of keys than of queries."""
    return eagle_speculator(base_model, **{"feature_layers": [0, 1], "context_kv_heads": 1} | config)


def hydra_plus_speculator(base_model, **config):
    """Hydra++ heads whose weights are far from where they start."""
    torch.manual_seed(0)
    shape = base_model.config.get_text_config(decoder=True)
    sizes = {"vocab_size": shape.vocab_size, "emb_dim": shape.hidden_size, "n_predict": 3, "context_heads": 2}
    speculator = HydraModel(HydraConfig(**sizes | {"prefix_layer": True, "n_blocks": 2} | config)).eval()
    speculator.speculator.start_from(base_model)
    with torch.no_grad():
        for weight in speculator.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return speculator


def streaming_speculator(base_model, **config):
    """Streams with adapters that are far from where they start."""
    torch.manual_seed(0)
    shape = base_model.config.get_text_config(decoder=True)
    sizes = {"vocab_size": shape.vocab_size, "emb_dim": shape.hidden_size, "n_streams": 3, "stream_lora_rank": 4}
    speculator = StreamingSpeculator(StreamingConfig(**sizes | {"n_stream_layers": 1} | config)).eval()
    speculator.speculator.fit(base_model)
    speculator.speculator.start_from(base_model)
    with torch.no_grad():
        for weight in speculator.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return speculator


def context_speculator(base_model, **config):
    """One with a context layer, whose weights are far from where they start; it reads features of two layers."""
    torch.manual_seed(0)
    shape = base_model.config.get_text_config(decoder=True)
    sizes = {"vocab_size": shape.vocab_size, "emb_dim": shape.hidden_size, "n_predict": 3, "context_heads": 2}
    speculator = ContextSpeculator(ContextConfig(**sizes | {"feature_layers": [0, 1]} | config)).eval()
    speculator.speculator.start_from(base_model)
    with torch.no_grad():
        for weight in speculator.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return speculator
