"""Guests of a base model's forward: rows that a drafter adds to it in the upper layers, and adapters on these alone.

The model's own rows come first, and come out as they do without a guest. A guest belongs to the forward of one thread;
the hooks that let it in do nothing in any other.
"""

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from .families import decoder_layers
from .shared_hooks import shared_hooks


class Guest:
    """What a forward does otherwise than the model alone would."""

    def enter(self, layer: int, inputs: dict) -> None:
        """Changes what enters a layer, counted from 0: its arguments by name."""

    def leave(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What goes on after the last layer: (batch, rows, hidden_size)."""
        return hidden_states

    def adapt(self, layer: int, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """What a linear layer returns."""
        return outputs


class _Current(threading.local):
    guest: Guest | None = None


_current = _Current()


@contextmanager
def received(guest: Guest) -> Iterator[None]:
    """The forwards of this thread meanwhile have a guest, where the model is one of `guests_allowed`."""
    before, _current.guest = _current.guest, guest
    try:
        yield
    finally:
        _current.guest = before


@contextmanager
def guests_allowed(base_model, adapted: tuple[tuple[int, str], ...] = ()) -> Iterator[None]:
    """A base model takes guests meanwhile.

    Args:
        adapted: linear layers that guests adapt: of which layer, and under which name in it.
    """
    layers = decoder_layers(base_model)
    hooks = [(layer, "enter", partial(_let_in, at)) for at, layer in enumerate(layers)]
    hooks.append((layers[-1], "leave", _let_out))
    hooks += [(layers[at].get_submodule(name), "adapt", partial(_let_adapt, at, name)) for at, name in adapted]
    with shared_hooks(hooks):
        yield


_ON_CACHED_ROWS = ("kv_b_proj",)


def linear_layers(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """The linear layers of a decoder's layer that run on all its rows, by name: their inputs and outputs.

    Fused or not; but none of or beside a mixture's experts, which are given rows by choice, and none that runs on
    cached rows, too (latent keys, arXiv 2405.04434).
    """
    inner = [f"{name}." for name, part in layer.named_modules() if hasattr(part, "experts") or _wrapped(part)]
    found = {}
    for name, part in layer.named_modules():
        if name.startswith(tuple(inner)):
            continue
        part = _wrapped(part) or part
        if name.rpartition(".")[2] in _ON_CACHED_ROWS:
            continue
        if isinstance(part, nn.Linear):
            found[name] = (part.in_features, part.out_features)
        elif type(part).__name__ == "Conv1D":  # GPT-2's, with the weight turned
            found[name] = tuple(part.weight.shape)
    return found


def _wrapped(part: nn.Module) -> nn.Module | None:
    """The layer that an adapter of peft wraps; None for others."""
    layer = getattr(part, "base_layer", None)
    return layer if isinstance(layer, nn.Module) else None


def _let_in(at: int, layer: nn.Module):
    parameters = tuple(inspect.signature(type(layer).forward).parameters)[1:]
    if "hidden_states" not in parameters:  # something around the layer, which passes on what it is given
        parameters = ("hidden_states",)

    def enter(module, args, kwargs):
        guest = _current.guest
        if guest is None:
            return None
        if len(args) > len(parameters):
            raise ValueError(f"{type(module).__name__} takes {len(args)} arguments by position, which have no names.")
        inputs = dict(zip(parameters, args, strict=False)) | kwargs
        guest.enter(at, inputs)
        return (inputs.pop("hidden_states"),), inputs

    return layer.register_forward_pre_hook(enter, with_kwargs=True)


def _let_out(layer: nn.Module):
    def leave(module, args, output):
        guest = _current.guest
        if guest is None:
            return None
        if isinstance(output, tuple):
            return guest.leave(output[0]), *output[1:]
        return guest.leave(output)

    return layer.register_forward_hook(leave)


def _let_adapt(at: int, name: str, linear: nn.Module):
    def adapt(module, args, output):
        guest = _current.guest
        return None if guest is None else guest.adapt(at, name, args[0], output)

    return linear.register_forward_hook(adapt)


__all__ = ["Guest", "guests_allowed", "linear_layers", "received"]
