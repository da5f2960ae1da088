"""Base models whose forward is not a function of each token by itself, and of those that it attends to.

Drafted tokens are run beside the accepted one: where what is run together has a say, they would change the text.
"""

from torch import nn

from .transformers_api import pre_hook_arguments


# torch's own layers that quantize activations when they run. By name, because these rooms are to leave torch.
_DYNAMIC_LAYERS = (
    "torch.ao.nn.quantized.dynamic",
    "torch.ao.nn.intrinsic.quantized.dynamic",
    "torch.ao.nn.sparse.quantized.dynamic",
)
_FAKE_QUANTIZE = "torch.ao.quantization.fake_quantize"


def check_tokenwise(model) -> None:
    """Raises a ValueError where drafted tokens would change what a base model says of others."""
    name = type(model).__name__
    remedy = (
        "Or set `speculator.config.n_candidates = 0`, so that every forward has one token; or drop `assistant_model`."
    )
    layer = scaled_together(model)
    if layer is not None:
        raise ValueError(
            f"{name} has layers ({layer}) that quantize activations with one scale for all tokens of a forward, which "
            "drafted ones would change. Take a quantization of the weights alone, or with a scale for each token "
            f"(torchao: `PerRow`). {remedy}"
        )
    adapter = invoked_adapter(model)
    if adapter is not None:
        raise ValueError(
            f"{name} has an adapter, {adapter!r}, that acts on the last tokens of a forward, from an invocation on "
            f"(`alora_invocation_tokens`), which drafted ones would push away. Disable it, or take LoRA. {remedy}"
        )


def scaled_together(model: nn.Module) -> str | None:
    """The class of a layer that has one scale for the activations of all tokens, found when it runs; None without."""
    for name, module in model.named_modules():
        rooms = {base.__module__ for base in type(module).__mro__}
        if any(room.startswith(_DYNAMIC_LAYERS) for room in rooms) and module.weight().is_quantized:
            return f"{type(module).__module__}.{type(module).__name__}"
        # In training for quantization: of the weights such a scale depends on nothing else.
        if _FAKE_QUANTIZE in rooms and not name.endswith("weight_fake_quant") and module.observer_enabled.any():
            return type(module).__name__
    for weight in model.parameters():
        # As torchao keeps what it does to activations.
        granularity = getattr(getattr(weight, "act_quant_kwargs", None), "granularity", None)
        if type(granularity).__name__ == "PerTensor":
            return f"{type(weight).__name__} with `PerTensor`"
    return None


def invoked_adapter(model: nn.Module) -> str | None:
    """The name of an activated LoRA (arXiv 2504.12397) that is at work; None without."""
    configs = [getattr(module, "peft_config", None) for module in model.modules()]
    names = {
        name
        for of_module in configs
        for name, config in (of_module or {}).items()
        if getattr(config, "alora_invocation_tokens", None)
    }
    if not names:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer  # it is there, and others need not wait for its import

    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not module.disable_adapters:
            of_rows = pre_hook_arguments(module, "adapter_names")  # of a batch with an adapter for each row
            at_work = names.intersection(module.active_adapters if of_rows is None else of_rows)
            if at_work:
                return min(at_work)
    return None
