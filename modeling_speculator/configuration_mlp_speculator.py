"""Configuration of an MLP speculator, in the keys of the published `mlp_speculator` checkpoints."""

import itertools
import math
import operator

from transformers import PreTrainedConfig

from .formats import read_config
from .lookup import check_n_lookup_tokens


# Candidates that the published checkpoints draft: [5, 3, 2] for three heads, then two children per node.
_PUBLISHED_TOP_K = [5, 3]


# What is read at each call, in the order of `MLPSpeculatorConfig.check_dials`.
DIALS = ("top_k_tokens_per_head", "n_candidates", "n_tree_nodes", "n_heads", "n_lookup_tokens")


class MLPSpeculatorConfig(PreTrainedConfig):
    """Shape and dials of a combined token/embedding speculator (arXiv 2404.19124).

    Args:
        vocab_size: vocabulary of the base model.
        emb_dim: hidden size of the base model, the width of a context vector.
        inner_dim: width of the speculator's state; 0 means `emb_dim`.
        n_predict: number of heads, the most tokens that a draft can hold.
        top_k_tokens_per_head: children per node, one number a head; a dial, read at each call.
            Default: 5, 3, then 2 for every further head.
        n_candidates: drafted sequences to verify; a dial, read at each call. 0 turns speculation off.
        n_tree_nodes: if set, the drafted tokens to verify: the most probable nodes of the whole tree, in place of its
            `n_candidates` most probable leaves; a dial, read at each call.
        n_heads: if set, the heads that draft, the first ones; a dial, read at each call.
        n_lookup_tokens: if not 0, one more branch of so many tokens: what followed when the text last went as it ends
            now; a dial, read at each call.
        tie_weights: share embedding, head and norm among all heads, and the projection among all but the first.
        scale_input: normalise the context vector before the first head.
        method: the cell, "sum_rnn" (arXiv 2404.19124) or "sum_lstm" (gated, Arctic Inference; its heads are always
            tied: `tie_weights=True`).
        base_model_name_or_path: the base model that the speculator was trained for.
        base_model_revision: its commit on the Hub, where that is known.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    model_type = "mlp_speculator"
    methods = ("sum_rnn", "sum_lstm")  # the first is the published one, which config.json does not name
    attribute_map = {"hidden_size": "emb_dim", "tie_word_embeddings": "tie_weights"}

    vocab_size: int = 32000
    emb_dim: int = 4096
    inner_dim: int = 0
    n_predict: int = 3
    top_k_tokens_per_head: list[int] | None = None
    n_candidates: int = 5
    n_tree_nodes: int | None = None
    n_heads: int | None = None
    n_lookup_tokens: int = 0
    tie_weights: bool = False
    scale_input: bool = False
    method: str = "sum_rnn"
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    # Those of the base model count; text-generation pipelines compare an assistant's with them.
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        for name, least in (("vocab_size", 1), ("emb_dim", 1), ("inner_dim", 0), ("n_predict", 1)):
            value = getattr(self, name)
            if not _is_int(value) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, but is {value!r}.")
        if self.method not in self.methods:
            raise ValueError(f"`method` must be one of {', '.join(self.methods)}, but is {self.method!r}.")
        if self.method == "sum_lstm" and not self.tie_weights:
            raise ValueError('The heads of `method="sum_lstm"` share one cell: set `tie_weights=True`.')
        if self.top_k_tokens_per_head is None:
            self.top_k_tokens_per_head = (_PUBLISHED_TOP_K + [2] * self.n_predict)[: self.n_predict]
        self.top_k_tokens_per_head = list(self.top_k_tokens_per_head)
        self.check_dials(*(getattr(self, dial) for dial in DIALS))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """`PreTrainedConfig.from_dict`, for every form that speculators are published in."""
        return super().from_dict(read_config(config_dict), **kwargs)

    def take_special_tokens(self, base_config: PreTrainedConfig) -> None:
        """Takes over the base model's ids of special tokens, without which a text-generation pipeline takes the
        tokenizers for different."""
        config = base_config.get_text_config(decoder=True)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, getattr(config, name))

    def check_dials(
        self,
        top_k_tokens_per_head: list[int],
        n_candidates: int,
        n_tree_nodes: int | None = None,
        n_heads: int | None = None,
        n_lookup_tokens: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        """Raises a ValueError where the drafting dials don't fit this speculator or one another.

        Args:
            vocab_size: ids that can be drafted; by default the speculator's.
        """
        top_k, vocab_size = top_k_tokens_per_head, self.vocab_size if vocab_size is None else vocab_size
        if len(top_k) != self.n_predict:
            raise ValueError(
                f"`top_k_tokens_per_head` needs one number for each of the {self.n_predict} heads (`n_predict`), "
                f"but is {top_k}: {len(top_k)} given."
            )
        if not all(_is_int(k) and 1 <= k <= vocab_size for k in top_k):
            raise ValueError(
                f"`top_k_tokens_per_head` must hold integers between 1 and the vocabulary's {vocab_size}, "
                f"but is {top_k}."
            )
        if n_heads is not None and not (_is_int(n_heads) and 1 <= n_heads <= self.n_predict):
            raise ValueError(
                f"`n_heads` must be None or an integer between 1 and `n_predict={self.n_predict}`, but is {n_heads!r}."
            )
        top_k = top_k[:n_heads]
        if not _is_int(n_candidates) or not 0 <= n_candidates <= math.prod(top_k):
            raise ValueError(
                f"`n_candidates` must be an integer between 0 and {math.prod(top_k)}, the number of leaves that "
                f"`top_k_tokens_per_head={top_k}` can draft, but is {n_candidates!r}. "
                "Lower `n_candidates` or raise `top_k_tokens_per_head`."
            )
        n_nodes = sum(itertools.accumulate(top_k, operator.mul))
        if n_tree_nodes is not None and not (_is_int(n_tree_nodes) and 1 <= n_tree_nodes <= n_nodes):
            raise ValueError(
                f"`n_tree_nodes` must be None or an integer between 1 and {n_nodes}, the number of nodes that "
                f"`top_k_tokens_per_head={top_k}` can draft, but is {n_tree_nodes!r}. "
                "Lower `n_tree_nodes` or raise `top_k_tokens_per_head`."
            )
        check_n_lookup_tokens(n_lookup_tokens)

    def to_diff_dict(self) -> dict:
        """What is saved: as in the published files, nothing that is off or unset, nor the published `method`.

        Nor `auto_map`, which speaks of code in the repository that this was loaded from.
        """
        saved = {
            key: value for key, value in super().to_diff_dict().items() if value is not None and value is not False
        }
        saved.pop("auto_map", None)
        if saved.get("n_lookup_tokens") == 0:
            del saved["n_lookup_tokens"]
        if saved.get("method") == self.methods[0]:
            del saved["method"]
        return saved


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


__all__ = ["MLPSpeculatorConfig"]
