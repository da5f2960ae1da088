"""Where context vectors come from: the decoder of a base model, after its final norm; its LM head reads them, too.

And features: what enters some of its layers, where a drafter asks for that.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .cache import CatchesStates
from .families import decoder_layers
from .shared_hooks import shared_hooks
from .transformers_api import cache_of


@contextmanager
def handed_to_cache(model, feature_layers: Sequence[int] = ()) -> Iterator[None]:
    """Each forward of the base model meanwhile leaves its context vectors in the `SpeculativeCache` that it was given,
    and what enters some of its layers.

    By way of the cache, because the model may at the same time serve other threads, which have other caches.
    """
    layers = decoder_layers(model) if feature_layers else ()
    hooks = [(layers[at], "hand over", partial(_listen, at)) for at in feature_layers]
    with shared_hooks([(model.get_decoder(), "hand over", _listen_after), *hooks]):
        yield


def _listen_after(decoder):
    return decoder.register_forward_hook(_hand_over)


def _listen(at: int, layer):
    def hand_over(module, args, kwargs) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, CatchesStates):
                value.catch(at, entering(args, kwargs))

    return layer.register_forward_pre_hook(hand_over, with_kwargs=True)


def _hand_over(module, args, output) -> None:
    cache = cache_of(output)
    if isinstance(cache, CatchesStates):
        cache.catch(None, output.last_hidden_state)


def entering(args: tuple, kwargs: dict) -> torch.Tensor:
    """The hidden states among the arguments of a decoder's layer."""
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def recorded_states(model, feature_layers: Sequence[int] = ()) -> Iterator[dict[int | None, list[torch.Tensor]]]:
    """What each forward of the base model meanwhile makes: by layer what enters it, context vectors by None.

    Each (batch, length, emb_dim).
    """
    states = {at: [] for at in (None, *feature_layers)}
    layers = decoder_layers(model) if feature_layers else ()
    after = model.get_decoder().register_forward_hook(
        lambda module, args, output: states[None].append(output.last_hidden_state)
    )

    def record(at: int):
        return lambda module, args, kwargs: states[at].append(entering(args, kwargs))

    before = [layers[at].register_forward_pre_hook(record(at), with_kwargs=True) for at in set(feature_layers)]
    try:
        yield states
    finally:
        for handle in (after, *before):
            handle.remove()


class Reading(NamedTuple):
    """What a base model makes of a text.

    hidden_states: (batch, length, emb_dim), context vectors.
    features: (batch, length, emb_dim * layers), what enters some layers, one after the other; None without layers.
    """

    hidden_states: torch.Tensor
    features: torch.Tensor | None

    @classmethod
    def of(cls, states: dict[int | None, list[torch.Tensor]], feature_layers: Sequence[int] = ()) -> "Reading":
        """Of the one forward that was recorded."""
        (hidden_states,) = states[None]
        features = [states[at][0].to(hidden_states.device) for at in feature_layers]
        return cls(hidden_states, torch.cat(features, dim=-1) if features else None)


@torch.no_grad()
def read_text(model, text: torch.Tensor, attention_mask: torch.Tensor, feature_layers: Sequence[int] = ()) -> Reading:
    """Reads a finished text, by one forward.

    Args:
        text: (batch, length), left-padded.
        attention_mask: (batch, <= length), of its beginning, 0 at padding.
        feature_layers: the input of which is read, too.
    """
    mask = F.pad(attention_mask, (0, text.shape[1] - attention_mask.shape[1]), value=1)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with recorded_states(model, feature_layers) as states:
        model.get_decoder()(input_ids=text, attention_mask=mask, position_ids=position_ids, use_cache=False)
    return Reading.of(states, feature_layers)


def read_context_vectors(model, text: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Those of a finished text, (batch, length) -> (batch, length, emb_dim); see `read_text`."""
    return read_text(model, text, attention_mask).hidden_states


def mask_of_text(places: torch.Tensor, window: int | None, segments: torch.Tensor | None) -> torch.Tensor:
    """(batch or 1, 1, n, n) bool: which places each place of a text attends to."""
    back = places[:, None] - places
    mask = (back >= 0) if window is None else (back >= 0) & (back < window)
    if segments is None:
        return mask[None, None]
    return (mask & (segments[:, None] == segments[:, :, None]))[:, None]
