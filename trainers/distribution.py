"""Which processes train, and where the base model and the speculator lie among them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..transformers_api import layer_classes


def check_distribution(accelerator: Accelerator, num_processes: int | None) -> None:
    """Raises a ValueError where training would run on fewer processes, or in another way, than the launcher was told.

    accelerate falls back to one process, or to plain data parallelism, without a word: on a CPU, for example.
    """
    if num_processes is not None and accelerator.num_processes != num_processes:
        raise ValueError(
            f"`num_processes={num_processes}`, but {accelerator.num_processes} are running. Start them with "
            "`accelerate launch --num_processes N` (CPU: `torchrun --nproc_per_node N`), or change `num_processes`."
        )
    for variable, expected in (
        ("ACCELERATE_USE_FSDP", DistributedType.FSDP),
        ("ACCELERATE_USE_DEEPSPEED", DistributedType.DEEPSPEED),
    ):
        if os.environ.get(variable, "false").lower() == "true" and accelerator.distributed_type != expected:
            raise ValueError(
                f"accelerate was configured for {expected.value}, but runs as {accelerator.distributed_type.value}: "
                "it needs several processes with a GPU each. Take recipes/accelerate_configs/single.yaml or "
                "multi_gpu.yaml."
            )


def prepare_fsdp(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """What accelerate's FSDP2 does by itself does not suit a speculator.

    It would shard the embeddings apart from the rest, to which they may be tied; and with bf16 it would round losses,
    counts, and sums of gradients to bf16, too.
    """
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin is None or plugin.fsdp_version != 2:
        return
    model.get_input_embeddings = lambda: None
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32, output_dtype=None
        )


def place_base_model(base_model: PreTrainedModel, accelerator: Accelerator, sharded: bool) -> PreTrainedModel:
    """Puts the base model where the training runs: a copy on every device, or a share of each weight.

    Under ZeRO-3 it gets an engine of its own, else its layers are sharded by `fully_shard`. A quantized model, or one
    that was spread over devices when it was loaded, stays where it is.

    Raises:
        ValueError: if it can't be sharded.
    """
    base_model = base_model.eval()
    quantized = getattr(base_model, "hf_quantizer", None) is not None
    zero3 = accelerator.distributed_type == DistributedType.DEEPSPEED and (
        accelerator.state.deepspeed_plugin.zero_stage == 3
    )
    if not sharded and not zero3:
        spread = quantized or getattr(base_model, "hf_device_map", None) is not None
        return base_model if spread else base_model.to(accelerator.device)
    if quantized:
        raise ValueError("A quantized base model can't be sharded. Set `shard_base_model: false`, or don't quantize.")
    if accelerator.num_processes == 1:
        raise ValueError(
            "`shard_base_model` needs several processes to shard over: start them with `accelerate launch`."
        )
    whole = sum(getattr(weight, "ds_numel", weight.numel()) for weight in base_model.parameters())
    base_model.requires_grad_(False)  # or gradients of shares would be reckoned with
    base_model = _own_zero3_engine(base_model, accelerator) if zero3 else _fully_sharded(base_model, accelerator)
    held = sum(_held_here(weight).numel() for weight in base_model.parameters())
    if held > 1.5 * whole / accelerator.num_processes:
        raise RuntimeError(f"The base model was to be sharded, but this process holds {held} of its {whole} weights.")
    return base_model


def _held_here(weight: nn.Parameter) -> torch.Tensor:
    """What this process holds of a weight when nobody uses it."""
    if isinstance(weight, DTensor):
        return weight.to_local()
    return getattr(weight, "ds_tensor", weight)


def _fully_sharded(base_model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    layers = [module for module in base_model.modules() if type(module).__name__ in layer_classes(base_model)]
    if not layers:
        raise ValueError(f"{type(base_model).__name__} does not say what its layers are: it can't be sharded.")
    mesh = dist.device_mesh.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in layers:
        fully_shard(layer.to(accelerator.device), mesh=mesh)
    return fully_shard(base_model.to(accelerator.device), mesh=mesh)


def _own_zero3_engine(base_model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    import deepspeed

    plugin = accelerator.state.deepspeed_plugin.deepspeed_config
    hidden_size = base_model.config.get_text_config(decoder=True).hidden_size
    config = {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and of no consequence without training
        "bf16": {"enabled": base_model.dtype == torch.bfloat16},
        "fp16": {"enabled": base_model.dtype == torch.float16},
        "zero_optimization": {
            **plugin["zero_optimization"],
            "stage": 3,
            # transformers' own choice for the sizes that "auto" stands for (integrations/deepspeed.py).
            "reduce_bucket_size": hidden_size * hidden_size,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        },
    }
    engine, *_ = deepspeed.initialize(model=base_model, config=config)
    engine.module.zero3_engine = [engine]  # kept alive with it; in a list, so that it is no sub-module
    return engine.module.eval()


def is_sharded(base_model: PreTrainedModel) -> bool:
    """Whether every process must make the same forwards of it."""
    return hasattr(base_model, "zero3_engine") or isinstance(base_model, FSDPModule)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All of the weights of a trained model in every process, whatever it is sharded by, to call its methods."""
    if isinstance(model, FSDPModule):
        model.unshard()
        try:
            yield
        finally:
            model.reshard()
    elif any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            yield
    else:
        is_fsdp1 = isinstance(model, FullyShardedDataParallel)
        with FullyShardedDataParallel.summon_full_params(model, writeback=False) if is_fsdp1 else nullcontext():
            yield


def are_finite(model: nn.Module) -> bool:
    """Whether the weights of a trained model are, those that this process holds."""
    return all(bool(_held_here(weight).isfinite().all()) for weight in model.parameters())
