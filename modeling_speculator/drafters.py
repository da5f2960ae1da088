"""The drafters that the loop takes: a new one is a file beside `modeling_medusa.py`, and its line here.

What the loop needs of one are `config` (with `model_type`, `vocab_size`, `emb_dim`, `n_predict`, `n_candidates`) and
`generate_candidates`, but for `PromptLookup`, which has no heads. One that wants more than the last context vector
says so by `reads_prompt` and `reads_text`, names the layers whose input it wants in `config.feature_layers`, and has a
`start` that returns what it knows of a call (`drafter_state.py`) and a `with_context` that computes the same of a
whole text. What is measured of it goes by all of `DIALS` and by a `forward` as the MLP speculator's; the trainers
need a `Cell`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from .configuration_mlp_speculator import DIALS, MLPSpeculatorConfig
from .modeling_context import ContextConfig, ContextSpeculator
from .modeling_eagle import EagleConfig, EagleSpeculator
from .modeling_hydra import HydraConfig, HydraModel
from .modeling_medusa import MedusaConfig, MedusaModel
from .modeling_mlp_speculator import MLPSpeculatorPreTrainedModel
from .modeling_prompt_lookup import PromptLookupConfig
from .modeling_redrafter import ReDrafterConfig, ReDrafterModel
from .modeling_residual import ResidualConfig, ResidualSpeculator
from .modeling_streaming import StreamingConfig, StreamingSpeculator
from .modeling_unconditioned import UnconditionedConfig, UnconditionedSpeculator


DRAFTERS: dict[type[PreTrainedConfig], type[PreTrainedModel]] = {
    MLPSpeculatorConfig: MLPSpeculatorPreTrainedModel,
    MedusaConfig: MedusaModel,
    ResidualConfig: ResidualSpeculator,
    ContextConfig: ContextSpeculator,
    EagleConfig: EagleSpeculator,
    HydraConfig: HydraModel,
    ReDrafterConfig: ReDrafterModel,
    StreamingConfig: StreamingSpeculator,
    UnconditionedConfig: UnconditionedSpeculator,
}


def register_drafter(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> None:
    """Lets `AutoModel` load a drafter, `generate` draft with it, and a recipe train it by its `method`."""
    DRAFTERS[config_class] = model_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)


def is_drafter(assistant_model) -> bool:
    """Whether `assistant_model` is one that this package's loop drafts with."""
    model_type = getattr(getattr(assistant_model, "config", None), "model_type", None)
    return model_type in {config_class.model_type for config_class in (*DRAFTERS, PromptLookupConfig)}


def config_class_of(method: str) -> type[MLPSpeculatorConfig]:
    """The config of speculators of a `method`.

    Raises:
        ValueError: if there is none.
    """
    by_method = {method: config_class for config_class in DRAFTERS for method in getattr(config_class, "methods", ())}
    if method not in by_method:
        raise ValueError(f"`method` must be one of {', '.join(by_method)}, but is {method!r}.")
    return by_method[method]


def dials_of(drafter) -> dict:
    """What a drafter's config says of how it drafts."""
    return {dial: getattr(drafter.config, dial, None) for dial in DIALS}


@contextmanager
def turned(drafter, dials: dict) -> Iterator[None]:
    """A drafter drafts by other dials meanwhile."""
    before = {dial: getattr(drafter.config, dial, None) for dial in dials}
    vars(drafter.config).update(dials)
    try:
        yield
    finally:
        vars(drafter.config).update(before)
