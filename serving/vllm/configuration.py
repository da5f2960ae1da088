"""A speculator's config.json as vLLM reads the config of a model of multi-token prediction."""

import sys

from transformers import PreTrainedConfig


ARCHITECTURE = "MLPSpeculatorPreTrainedModel"
# There is no attention; tensor parallelism wants a number that it divides.
_ATTENTION_HEADS = 64
# What vLLM reads, and no speculator's config.json holds.
_FOR_VLLM = ("num_nextn_predict_layers", "num_hidden_layers", "num_attention_heads", "hidden_size", "architectures")


class MLPSpeculatorConfig(PreTrainedConfig):
    """The shape of an MLP speculator, of any form that they are published in (its dials are vLLM's to set).

    Args:
        vocab_size, emb_dim: vocabulary and hidden size of the base model.
        inner_dim: width of the state; 0 means `emb_dim`.
        n_predict: number of heads.
        tie_weights: whether the heads share their weights.
        scale_input: whether the context vector is normalised first.
        method: the cell, "sum_rnn" (arXiv 2404.19124) or "sum_lstm" (Arctic's gated one).

    Raises:
        ValueError: for a form that can't be served.
    """

    model_type = "mlp_speculator"
    methods = ("sum_rnn", "sum_lstm")

    vocab_size: int = 32000
    emb_dim: int = 4096
    inner_dim: int = 0
    n_predict: int = 3
    tie_weights: bool = False
    scale_input: bool = False
    method: str = "sum_rnn"

    def __post_init__(self, **kwargs):
        super().__post_init__(**{key: value for key, value in kwargs.items() if key not in _FOR_VLLM})
        if self.method not in self.methods:
            raise ValueError(f"vLLM serves the cells {' and '.join(self.methods)}, not {self.method!r}.")
        self.inner_dim = self.inner_dim or self.emb_dim
        # Of the instance: the class is found by the published type.
        self.model_type = "mtp"
        self.architectures = [ARCHITECTURE]
        self.num_nextn_predict_layers = self.num_hidden_layers = self.n_predict
        self.hidden_size = self.emb_dim
        self.num_attention_heads = _ATTENTION_HEADS

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """`PreTrainedConfig.from_dict`, for Arctic's forms too: their gated one has other names for the widths."""
        config = {key: value for key, value in config_dict.items() if key != "architectures"}  # Arctic's is no list
        if "input_hidden_dim" in config:
            widths = {str(config.pop(name)) for name in ("emb_dim", "proj_dim", "inner_dim")}
            if len(widths) > 1 or not (width := widths.pop()).isdecimal():
                raise ValueError("Embeddings, projections or states of several widths are not supported.")
            config |= {"emb_dim": config.pop("input_hidden_dim"), "inner_dim": int(width)}
            if config.get("method") == "sum_lstm" and not config.get("tie_lstm_embs"):
                raise ValueError("An embedding for each gate (`tie_lstm_embs` off) is not supported.")
        return super().from_dict(config, **kwargs)


class ResidualConfig(MLPSpeculatorConfig):
    """The shape of a speculator that uses the base model's embeddings and LM head; `inner_dim` is within a head."""

    model_type = "residual_speculator"
    methods = ("residual",)

    method: str = "residual"


class ContextConfig(ResidualConfig):
    """That of a form which vLLM is known not to serve."""

    model_type = "context_speculator"

    def __post_init__(self, **kwargs):
        raise ValueError(
            "vLLM does not serve speculators with a context layer: its multi-token prediction keeps nothing of a "
            "drafter's between the steps of a sequence. Serve one of `method: residual`, which has none."
        )


class TransformersModel:
    """What `AutoModel` takes where vLLM's config of a speculator was found: the package's model, if it is imported."""

    config_class = MLPSpeculatorConfig

    @classmethod
    def from_pretrained(cls, path, *args, config: MLPSpeculatorConfig, **kwargs):
        package = sys.modules.get("modeling_speculator")
        if package is None:
            raise ValueError("To load a speculator into a transformers model, `import modeling_speculator` first.")
        published = {key: value for key, value in config.to_dict().items() if key not in _FOR_VLLM}
        drafters = {theirs.model_type: (theirs, model) for theirs, model in package.drafters.DRAFTERS.items()}
        config_class, model_class = drafters[type(config).model_type]
        return model_class.from_pretrained(path, *args, config=config_class.from_dict(published), **kwargs)


class TransformersResidualModel(TransformersModel):
    """The same, for the other type: `AutoModel` compares."""

    config_class = ResidualConfig


MODELS = (TransformersModel, TransformersResidualModel)
