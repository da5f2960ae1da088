"""The decoding loop with steps of fixed shapes, which are compiled: `cache_implementation="static"`."""

import functools

import torch
from torch._dynamo import config as dynamo_config
from transformers import CompileConfig

from .candidate_tree import CandidateTree
from .decoding import SpeculativeDecoder


# The least number of slots that attention looks at. Views of the cache come in powers of two, so that a large one
# costs nothing while the text is short; each costs a compilation. Below this, looking at less saves nothing.
_LEAST_VIEW = 256


class StaticDecoder(SpeculativeDecoder):
    """A `SpeculativeDecoder` whose trees are padded to their bound, and whose cache is looked at in powers of two.

    On CUDA, and elsewhere where the caller passes a `compile_config`, drafting, verifying, accepting and keeping are
    one compiled function. Where something else is to be done with the logits, it ends with them.
    """

    may_be_dense = False

    def capacity(self) -> int:
        """A power of two, for the least number of compiled functions, or the caller's `max_cache_len` if more."""
        return max(_power_of_two(super().capacity()), self.request.generation_config.max_cache_len or 0)

    def decode(self) -> None:
        self.read(self.report(self.bare_root))
        step = _step if self.is_self_contained else _propose
        compile_config = self.compile_config()
        if compile_config is not None:
            step = _compiled(step, compile_config.backend, compile_config.mode, _hashable(compile_config.options))
        # One compiled function for each size of the view, batch, model and dial: far below what is no longer sensible.
        with dynamo_config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
            while self.goes_on():
                self.choose()
                in_use = self.longest - 1 + self.in_cache_only + self.max_nodes
                view = min(_power_of_two(in_use), self.cache.slots.capacity)
                if self.is_self_contained:
                    report = step(self, view)
                else:
                    tree, root_column, outputs = step(self, view)
                    self.accept(tree, root_column, outputs)
                    report = self.report(tree)
                self.read(report)

    def compile_config(self) -> CompileConfig | None:
        """How to compile, None for not at all: as `generate` decides it without a speculator."""
        given = self.request.generation_config.compile_config
        wanted = self.device.type == "cuda" or given is not None
        if not wanted or self.request.generation_config.disable_compile:
            return None
        return given or CompileConfig()


def _step(decoder: StaticDecoder, view: int) -> torch.Tensor:
    """Draft, verify, accept, keep: a function of the decoder's tensors, which returns what the host wants to know."""
    tree = decoder.draft()
    decoder.step(tree, view)
    return decoder.report(tree)


def _propose(decoder: StaticDecoder, view: int) -> tuple[CandidateTree, torch.Tensor, object]:
    """Draft and verify."""
    tree = decoder.draft()
    root_column = decoder.lengths + (decoder.in_cache_only - 1)
    return tree, root_column, decoder.verify(tree, root_column, view)


@functools.cache
def _compiled(function, backend, mode: str | None, options: tuple | None):
    options = None if options is None else dict(options)
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend, mode=mode, options=options)


def _hashable(options: dict | None) -> tuple | None:
    return None if options is None else tuple(sorted(options.items()))


def _power_of_two(number: int) -> int:
    return max(_LEAST_VIEW, 1 << (number - 1).bit_length())
