"""Where context vectors come from: the decoder of a base model, after its final norm; its LM head reads them, too."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional as F

from .cache import SpeculativeCache
from .transformers_api import cache_of


# Of each decoder that is at work: its calls and its hook. One for all calls: a compiled step is guarded by the hooks
# that were there, and other threads' calls, which come and go meanwhile, must not change them.
_at_work: WeakKeyDictionary = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def handed_to_cache(model) -> Iterator[None]:
    """Each forward of the base model meanwhile leaves its context vectors in the `SpeculativeCache` that it was given.

    By way of the cache, because the model may at the same time serve other threads, which have other caches.
    """
    decoder = model.get_decoder()
    with _lock:
        calls, handle = _at_work.get(decoder) or (0, decoder.register_forward_hook(_hand_over))
        _at_work[decoder] = calls + 1, handle
    try:
        yield
    finally:
        with _lock:
            calls, handle = _at_work.pop(decoder)
            if calls > 1:
                _at_work[decoder] = calls - 1, handle
            else:
                handle.remove()


def _hand_over(module, args, output) -> None:
    cache = cache_of(output)
    if isinstance(cache, SpeculativeCache):
        cache.context_vectors = output.last_hidden_state


@torch.no_grad()
def read_context_vectors(model, text: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Those of a finished text, by one forward.

    Args:
        text: (batch, length), left-padded.
        attention_mask: (batch, <= length), of its beginning, 0 at padding.

    Returns:
        (batch, length, emb_dim).
    """
    mask = F.pad(attention_mask, (0, text.shape[1] - attention_mask.shape[1]), value=1)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    outputs = model.get_decoder()(input_ids=text, attention_mask=mask, position_ids=position_ids, use_cache=False)
    return outputs.last_hidden_state
