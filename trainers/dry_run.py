"""What a recipe would train and need, without a download, a GPU or a step: a mistake costs seconds."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from ..checks import check_positions, check_shapes
from ..context_vectors import Reading
from ..drafters import DRAFTERS
from ..families import check_feature_layers, decoder_layers, output_logits
from ..loading import base_model_config, speculator_config
from ..measuring.prompts import read_prompts
from ..modeling_streaming import StreamingCell
from ..streams import KEPT_BYTES
from ..transformers_api import fake_tensors, storage_id
from .alignment import TrainingBatch, align
from .base_model import read
from .chunked import CHUNK_ELEMENTS
from .data import load_texts
from .objective import Objective
from .recipe_parser import parse_recipe, split_config
from .speculators import new_config
from .training_args import DataArguments, ModelArguments, SpeculatorTrainingArguments


GIB = 2**30
# An H100 SXM's data sheet: dense bf16 products and memory bandwidth; and the share of the former that large products
# reach in practice.
FLOPS, BANDWIDTH, UTILISATION = 989e12, 3.35e12, 0.4
BYTES = {"4bit": 0.5, "8bit": 1.0}  # of a quantized weight


def dry_run(args: list[str]) -> dict:
    """Builds both models of a recipe without weights, sends a batch through them, and prints what a run would be.

    `base_model` may be a folder with nothing but a config.json. Files of data are looked for, but not read; a dataset
    of the Hub and the tokenizer are not opened.

    Args:
        args: a command line, as for `parse_recipe`.

    Returns:
        What is printed: parameters, GiB per GPU by component, tokens, an estimate of the time, and warnings.

    Raises:
        ValueError: where models, heads and lengths don't fit together, or models or files of data are not there.
    """
    model_args, data, training = parse_recipe(args)
    _find_data(data)
    config = base_model_config(model_args.base_model, model_args.base_model_revision)
    auto = model_args.base_model_dtype == "auto"
    dtype = (config.dtype or torch.float32) if auto else getattr(torch, model_args.base_model_dtype)
    with fake_tensors():  # shapes, dtypes and autograd, but no data: the meta device, with autocast
        return _dry_run(model_args, data, training, config, dtype, _speculator_config(model_args, config, args))


def _find_data(data: DataArguments) -> None:
    """Raises a ValueError where files or folders are not there; what may be a dataset of the Hub is not looked for."""
    if data.prompts is not None:
        for file in (data.prompts, *(data.held_out_prompts or ())):
            read_prompts(file)
    elif data.dataset is None or data.data_files is not None or Path(data.dataset).exists():
        load_texts(replace(data, streaming=True))  # of which nothing is read yet


def _dry_run(model_args, data, training, config, dtype: torch.dtype, speculator_config) -> dict:
    with no_init_weights():  # of which some look at numbers
        base_model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    base_model.tie_weights()
    speculator = DRAFTERS[type(speculator_config)](speculator_config)
    check_shapes(base_model, speculator)
    speculator.speculator.fit(base_model)
    check_feature_layers(base_model, speculator.speculator.feature_layers)
    rows = training.per_device_train_batch_size
    new_tokens = data.sequence_length if training.stage == 1 else data.generation_length
    length = new_tokens if training.stage == 1 else data.prompt_length + new_tokens
    text = torch.zeros(rows, length, dtype=torch.long)
    cell, labels = speculator.speculator, text[:, 1 - new_tokens - (training.stage == 2) :]
    reading = read(base_model, text[:, :-1], feature_layers=cell.feature_layers)
    if not cell.reads_text:
        reading = Reading(reading.hidden_states[:, -labels.shape[1] :], None)
    tokens = text[:, -reading.hidden_states.shape[1] :]
    batch = align(reading, tokens, labels, speculator.config.n_predict)
    objective = Objective(
        training.loss,
        training.weights_of("loss_weights", len(training.loss)),
        training.weights_of("head_weights", speculator.config.n_predict),
        speculator.config.top_k_tokens_per_head,
    )
    saved = _saved_for_backward(speculator, base_model, objective, batch, training.bf16)
    saved += KEPT_BYTES if isinstance(cell, StreamingCell) else 0  # what it computes again
    longest = _longest_text(data, training)
    check_positions(base_model, longest)

    gpus, machine = _machine(training.dry_run_gpus)
    weights = _count(base_model) * BYTES.get(model_args.base_model_quantization, dtype.itemsize)
    heads = sum(head.weight.numel() for head in {*getattr(speculator.speculator, "head", ())})
    written = training.generation_batch_size or rows
    memory = {
        "base model": weights / (gpus if training.shard_base_model else 1),
        "base model, a forward": _of_a_forward(base_model, text, data.separate_documents and training.stage == 1),
        # In float32; and the buckets that gradients are summed up in.
        "speculator: weights, gradients, Adam": (16 + 4) * _count(speculator),
        "speculator, for its backward": saved,
        "a chunk of logits and its gradient": 16 * min(CHUNK_ELEMENTS, tokens.numel() * speculator.config.vocab_size),
    }
    if training.stage == 2:
        memory["keys and values of the continuations"] = _key_value_bytes(base_model, text) * written / rows
    # Shared out, but for weights and gradients in bf16 in a step, and the heads' gradients until they are summed up.
    shared = 16 * _count(speculator) / gpus + 4 * _count(speculator) + 4 * heads
    with_fsdp2 = sum(memory.values()) - memory["speculator: weights, gradients, Adam"] + shared
    global_batch = rows * training.gradient_accumulation_steps * gpus
    seconds = training.gradient_accumulation_steps * _seconds(base_model, speculator, text, training.stage, weights)
    has_steps = training.max_steps > 0  # not so many epochs
    epochs = f"those of {training.num_train_epochs:g} epochs: set max_steps, to have time and tokens reckoned"
    report = {
        "stage": training.stage,
        "base model": f"{model_args.base_model}, {_count(base_model) / 1e9:.3f} B parameters, {dtype}".replace(
            "torch.", ""
        ),
        "speculator": f"{speculator.config.n_predict} heads, {_count(speculator) / 1e6:.1f} M parameters",
        "batch": f"{tuple(batch.hidden_states.shape)} context vectors, {tuple(batch.labels.shape)} labels a GPU",
        "for": f"{gpus} x {machine}",
        "sequences a step": global_batch,
        "tokens a step": global_batch * new_tokens,
        "steps": training.max_steps if has_steps else epochs,
        "tokens": training.max_steps * global_batch * new_tokens if has_steps else "not known",
        "GiB a GPU": {name: round(size / GIB, 2) for name, size in memory.items()},
        "GiB a GPU in all": round(sum(memory.values()) / GIB, 1),
        "... with FSDP2": round(with_fsdp2 / GIB, 1),
        "hours, estimated": round(training.max_steps * seconds / 3600, 1) if has_steps else "not known",
        "warnings": _warnings(base_model, speculator, longest),
    }
    _show(report)
    return report


def _longest_text(data: DataArguments, training: SpeculatorTrainingArguments) -> int:
    """Tokens of the longest text that the base model reads: in training, or when it is evaluated."""
    evaluates = training.evaluation_prompts > 0 and data.validation_fraction > 0
    if training.stage == 2:
        return data.prompt_length + data.generation_length
    evaluated = min(data.prompt_length, data.sequence_length) + data.generation_length
    return max(data.sequence_length - 1, evaluated if evaluates else 0)


def _machine(gpus: int | None) -> tuple[int, str]:
    """How many GPUs, and of which kind: those that are here, or 8 as the published recipe had."""
    here = torch.cuda.device_count()
    name = torch.cuda.get_device_name() if here else "H100 (there is no GPU here)"
    return gpus or here or 8, name


def _warnings(base_model: PreTrainedModel, speculator: PreTrainedModel, longest: int) -> list[str]:
    """What can be trained, but hardly on purpose."""
    found = []
    limit = getattr(base_model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        found.append(
            f"Texts of {longest} tokens are longer than the {limit} that the base model was trained for: what it says "
            "of the tokens beyond is worth little."
        )
    if _count(speculator) > _count(base_model):
        found.append(
            f"The speculator has {_count(speculator):,} parameters, the base model only {_count(base_model):,}: a "
            "draft costs more than it saves. Lower `inner_dim`, or set `tie_weights: true`."
        )
    return found


def _speculator_config(model_args: ModelArguments, base_config, args: list[str]):
    """That of a new speculator, of one that is there, or of the one that another recipe of the folder will make."""
    if model_args.speculator is None:
        return new_config(model_args, base_config)
    here = Path(model_args.speculator)
    _, path = split_config(args)
    if here.is_dir() or path is None:
        return speculator_config(model_args.speculator)
    for recipe in sorted(Path(path).parent.glob("*.yaml")):
        first, _, training = parse_recipe(["--config", str(recipe), "--base_model", model_args.base_model])
        if Path(training.output_dir) == here:
            print(f"{here} is not there yet; it will be what {recipe} makes.")
            return new_config(first, base_config)
    return speculator_config(model_args.speculator)  # of the Hub, or an error that says what it is not


def _saved_for_backward(
    speculator, base_model: PreTrainedModel, objective: Objective, batch: TrainingBatch, bf16: bool
) -> int:
    """Bytes that autograd keeps of a forward, weights and their gradients aside."""
    kept, shapes = {}, {weight.shape for weight in speculator.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # A chunk's logits are gone before the next chunk.
        if tensor.shape not in shapes and tensor.shape[-1:] != (speculator.config.vocab_size,):
            kept[storage_id(tensor)] = tensor.untyped_storage()  # and so alive: no other storage gets its address
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        base_logits = partial(output_logits, base_model, vocab_size=speculator.config.vocab_size)
        options = {"next_states": batch.next_states, "base_logits": base_logits}
        options = {"objective": partial(objective, **options), "base_model": base_model, "features": batch.features}
        out = speculator(*batch[:3], **options)
    assert out.losses.shape == (speculator.config.n_predict,)
    return sum(storage.nbytes() for storage in kept.values())


def _of_a_forward(base_model: PreTrainedModel, text: torch.Tensor, has_mask: bool) -> float:
    """Bytes of a layer's intermediate results, which is all that a forward without gradients holds at once."""
    config = base_model.config.get_text_config(decoder=True)
    width = 4 * config.hidden_size + 3 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    mask = text.numel() * text.shape[1] * (1 + base_model.dtype.itemsize) if has_mask else 0
    return text.numel() * width * base_model.dtype.itemsize + mask


def _key_value_bytes(base_model: PreTrainedModel, text: torch.Tensor) -> float:
    config = base_model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    key_heads = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None) or heads
    width = key_heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2 * text.numel() * config.num_hidden_layers * width * base_model.dtype.itemsize


def _seconds(base_model, speculator, text: torch.Tensor, stage: int, weights: float) -> float:
    """Of a micro-step on an H100: products at a usual rate, and generation at the memory's."""
    modules = speculator.modules()
    embeddings = sum(module.weight.numel() for module in modules if isinstance(module, torch.nn.Embedding))
    flops = text.numel() * (2 * _count(base_model) + 6 * (_count(speculator) - embeddings))
    if not hasattr(speculator.speculator, "head"):  # the base model's, which gets no gradient itself
        of_heads = speculator.config.n_predict * base_model.get_output_embeddings().weight.numel()
        flops += text.numel() * 4 * of_heads
    if isinstance(speculator.speculator, StreamingCell):
        # The main stream once more; each other one twice forward, as it is computed again, and back.
        upper = decoder_layers(base_model)[speculator.speculator.config.first_layer :]
        flops += text.numel() * (2 + 6 * speculator.config.n_predict) * sum(_count(layer) for layer in upper)
    reading = 0.0
    if stage == 2:
        reading = text.shape[1] * (weights + _key_value_bytes(base_model, text) / 2) / BANDWIDTH
    return flops / (UTILISATION * FLOPS) + reading


def _count(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def _show(report: dict) -> None:
    for name, value in report.items():
        if isinstance(value, list):
            for warning in value:
                print(f"WARNING: {warning}")
        elif isinstance(value, dict):
            print(f"{name}:")
            for part, size in value.items():
                print(f"  {part:38}{size:8.2f}")
        else:
            print(f"{name:20}{value:,}" if isinstance(value, int) else f"{name:20}{value}")
    print(
        f"With FSDP2 the speculator's state is shared out, but for a copy in bf16 during a step. Hours: of H100s at "
        f"{UTILISATION:.0%} of {FLOPS / 1e12:.0f} TFLOP/s and {BANDWIDTH / 1e12} TB/s, without loading and evaluation."
    )
