"""Attention of a few nodes over a long cache, for the length of one `generate` call."""

import threading
from collections import Counter
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from .transformers_api import attn_implementation, set_attn_implementation


# transformers' sdpa function repeats the keys and values of grouped-query models whenever there are a mask and more
# than one query: a copy of the whole cache per layer and step. This one leaves them as they are.
TREE_ATTENTION = "speculator_tree_sdpa"


def tree_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """`scaled_dot_product_attention` with the query heads of a group stacked as further queries.

    Only for the masks of `SpeculativeCache`, which are the only ones of floating point; anything else is transformers'
    own sdpa, so that a model in use by another thread computes what it always does.

    Args:
        query: (batch, heads, nodes, head_dim).
        key, value: (batch, kv_heads, slots, head_dim).
        attention_mask: (batch, 1, nodes, slots), added to the scores.

    Returns:
        (batch, nodes, heads, head_dim), and None for the weights.
    """
    if attention_mask is None or not attention_mask.is_floating_point():
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    batch, heads, nodes, dim = query.shape
    group = heads // key.shape[1]
    if group > 1:
        query = query.reshape(batch, key.shape[1], group * nodes, dim)
        if nodes > 1:
            attention_mask = attention_mask.repeat(1, 1, group, 1)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    # Not a view: CUDA's memory-efficient kernel returns another layout. Contiguous, as transformers' own returns it:
    # a model may call `view` on it.
    return output.reshape(batch, heads, nodes, value.shape[-1]).transpose(1, 2).contiguous(), None


AttentionInterface.register(TREE_ATTENTION, tree_attention_forward)
AttentionMaskInterface.register(TREE_ATTENTION, AttentionMaskInterface()["sdpa"])


def uses_sdpa(model) -> bool:
    """Whether the model runs with sdpa, be it our variant, in the middle of another thread's call."""
    return attn_implementation(model.config.get_text_config(decoder=True)) in ("sdpa", TREE_ATTENTION)


_lock = threading.Lock()
_users = Counter()  # of each config, by id: calls that are decoding with it


@contextmanager
def tree_attention(model):
    """Lets a model that uses sdpa use `tree_attention_forward` inside the `with` block, in all threads."""
    if not uses_sdpa(model):
        yield
        return
    config = model.config.get_text_config(decoder=True)
    with _lock:
        _users[id(config)] += 1
        set_attn_implementation(config, TREE_ATTENTION)
    try:
        yield
    finally:
        with _lock:
            _users[id(config)] -= 1
            if _users[id(config)] == 0:  # the last one puts it back
                del _users[id(config)]
                set_attn_implementation(config, "sdpa")
