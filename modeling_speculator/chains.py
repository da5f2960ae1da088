"""Base models with a recurrent state: a draft is a chain, and what is rejected is taken back by a copy of the state.

A recurrent state can't forget its last tokens. It is kept as it was after tokens that are certain; where a step
rejects some, the next one starts from there, and runs the accepted tokens again before its own, in the same forward.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .cache import CatchesStates, Slots
from .candidate_tree import CandidateTree
from .decoding import SpeculativeDecoder
from .transformers_api import CACHE


MOST_AGAIN = 16  # tokens that are run again with others, before they are run for good


class ChainCache(CatchesStates, DynamicCache):
    """A cache of transformers, with the states of its recurrent layers as they were after tokens that are certain.

    Attributes:
        n_again: tokens that the last forward ran again, before those of its chain.
    """

    dense = True  # no mask is needed

    def __init__(self, config, capacity: int, keeps_prompt: bool):
        super().__init__(config=config)
        self.catch_nothing(keeps_prompt)
        self.slots, self.n_again, self.kept = Slots(capacity), 0, []

    def start_steps(self, attention_mask: torch.Tensor, max_nodes: int, dense: bool = False) -> None:
        self.join_parts()
        self.commit()

    def catch(self, layer: int | None, hidden_states: torch.Tensor) -> None:
        super().catch(layer, hidden_states[:, self.n_again :])

    @property
    def is_prefill(self) -> bool:
        return not self.kept

    def commit(self) -> None:
        """All tokens that were run are certain."""
        self.kept = [_states(layer) for layer in self.layers]

    def take_back(self, n_tokens: int) -> None:
        """Takes back all tokens since `commit`, of which there are so many."""
        for layer, states in zip(self.layers, self.kept, strict=True):
            if states:
                for name, tensors in states.items():
                    for at, tensor in tensors.items():
                        getattr(layer, name)[at].copy_(tensor)
            if getattr(layer, "keys", None) is not None:
                layer.keys, layer.values = layer.keys[:, :, :-n_tokens], layer.values[:, :, :-n_tokens]

    def copy_to(self, cache, length: int, release: bool):
        """Hands its layers to a cache of transformers."""
        cache.layers = self.layers
        return cache


def _states(layer) -> dict[str, dict[int, torch.Tensor]]:
    """Copies of a layer's states, by their names and numbers; none of an attention layer."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return {}
    return {
        name: {at: tensor.clone() for at, tensor in getattr(layer, name).items() if tensor is not None}
        for name in ("conv_states", "recurrent_states")
    }


class ChainDecoder(SpeculativeDecoder):
    """One `generate` call of a base model with a recurrent state, of one sequence."""

    def make_cache(self, capacity: int):
        config = self.model.config.get_text_config(decoder=True)
        return ChainCache(config, capacity, self.drafting.reads_prompt)

    def prefill(self) -> None:
        self.ran = self.again = None
        super().prefill()

    def decode(self) -> None:
        super().decode()
        if self.request.generation_config.return_dict_in_generate:  # the cache is handed back
            self.settle_last()
            if self.again is not None:
                self.run_again()

    @property
    def allows_inference_mode(self) -> bool:
        """Its cache is handed back as it is, and must hold ordinary tensors."""
        return False

    def is_dense(self) -> bool:
        return True

    def keep(self, kept: torch.Tensor, root_column: torch.Tensor) -> None:
        """The next step does it, when the host knows how many."""

    def verify(self, tree: CandidateTree, root_column: torch.Tensor, in_use: int):
        self.settle_last()
        n = tree.input_ids.shape[1]
        self.cache.n_again = 0 if self.again is None else self.again.shape[1]
        self.ran = tree.input_ids if self.again is None else torch.cat([self.again, tree.input_ids], dim=1)
        along = torch.arange(-self.cache.n_again, n, device=self.device)[None]
        self.cache.slots.in_use = in_use
        outputs = self.model(
            input_ids=self.ran,
            position_ids=self.rows.positions(along),
            use_cache=True,
            return_dict=True,
            **{CACHE: self.cache},
        )
        return tree, outputs.logits[:, self.cache.n_again :], outputs

    def settle_last(self) -> None:
        """Takes back what the last step has rejected."""
        if self.ran is None:
            return
        n_ran = self.ran.shape[1]
        n_nodes = n_ran - self.cache.n_again
        n_kept = self.progress.n_emitted[0]
        if n_kept == n_nodes:
            self.cache.commit()
            self.again = None
        else:
            self.cache.take_back(n_ran)
            self.again = self.ran[:, : self.cache.n_again + n_kept]
            if self.again.shape[1] > MOST_AGAIN:
                self.run_again()
        self.ran = None

    def run_again(self) -> None:
        """Runs the tokens that are certain for good."""
        n = self.again.shape[1]
        along = torch.arange(-n, 0, device=self.device)[None]
        self.cache.n_again = n
        positions = self.rows.positions(along)
        self.model(input_ids=self.again, position_ids=positions, use_cache=True, **{CACHE: self.cache})
        self.cache.commit()
        self.again = None


def check_chain(model, speculator, request) -> None:
    """Raises a ValueError for what can't be done beside a recurrent state."""
    config, kinds = speculator.config, getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    is_chain = config.n_candidates <= 1 and getattr(config, "n_tree_nodes", None) is None
    is_chain &= config.n_predict == 0 or not getattr(config, "n_lookup_tokens", 0)
    obstacles = {
        "it verifies a chain, but no tree: set `speculator.config.n_candidates = 1`, `n_tree_nodes = None` and "
        "`n_lookup_tokens = 0`": not is_chain,
        "sequences that accept differently can't share it: pass one at a time": len(request.input_ids) > 1,
        "padding would change it: pass the prompt without": not bool(request.prompt_mask.all()),
        "there is no static cache of it: drop `cache_implementation`": request.is_static,
        "`output_hidden_states` is not supported beside it": request.returns("hidden_states"),
        "its attention forgets what leaves a window, which can't be taken back": "sliding_attention" in kinds,
        "streams can't run beside it": not getattr(speculator, "drafts_after_prompt", True),
    }
    for reason in (reason for reason, is_so in obstacles.items() if is_so):
        raise ValueError(f"{type(model).__name__} has a recurrent state: {reason}.")


__all__ = ["ChainCache", "ChainDecoder", "check_chain"]
