"""The decoding loop with steps of fixed shapes, which are compiled: `cache_implementation="static"`."""

import threading
from contextlib import nullcontext
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from transformers import CompileConfig
from transformers.utils import logging

from .candidate_tree import CandidateTree
from .decoding import SpeculativeDecoder
from .rows import Rows
from .transformers_api import cant_be_compiled, check_contract, mark_static_address, recompile_limits


logger = logging.get_logger(__name__)

# The least number of slots that attention looks at. Views of the cache come in few sizes, so that a large one costs
# nothing while the text is short; each costs a compilation. Below this, looking at less saves nothing.
_LEAST_VIEW = 256
# The cache's tensors that steps write to or read again and again: in a CUDA graph they must stay where they are.
_CACHE_STATE = ("columns", "free", "frontier", "along", "attend", "ignore")


@dataclass
class Workspace:
    """The memory of a finished call, for the next one: a CUDA graph is tied to the addresses it was recorded with."""

    layers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def is_inference(self) -> bool:
        return any(tensor.is_inference() for tensor in self.tensors.values())


_DEVICES_WITH_GRAPHS = ("cuda",)
# One compilation for each size of the view, batch, model, dial and setting of the processors: more than dynamo's 8.
_LIMITS = 256, 4096  # of a function, of all functions
# Of each model the last one, and no more: it holds a cache. A call takes it out, so that no other can.
_workspaces: WeakKeyDictionary = WeakKeyDictionary()
_compiled_functions: dict = {}
# Of several threads one at a time compiles, or starts a compiled step: under load, torch 2.13 has let a step run
# uncompiled beside another thread's compilation, and then raised an error.
_compiling = threading.Lock()


class StaticDecoder(SpeculativeDecoder):
    """A `SpeculativeDecoder` whose trees are padded to their bound, and whose cache is looked at in steps of size.

    On CUDA, and elsewhere where the caller passes a `compile_config`, drafting, verifying, accepting and keeping are
    one compiled function. Where something else is to be done with the logits, it ends with them.
    """

    may_be_dense = False
    allows_inference_mode = False  # a compiled step gains nothing by it

    def run(self) -> None:
        self.compile_config = self.choose_compile_config()
        self.keeps_storage = self.compile_config is not None and self.device.type in _DEVICES_WITH_GRAPHS
        self.workspace = (_workspaces.pop(self.model, None) if self.keeps_storage else None) or Workspace()
        if self.workspace.is_inference() and not torch.is_inference_mode_enabled():
            self.workspace = Workspace()  # what was made in inference mode can't be written to outside of it
        super().run()

    def retire(self) -> None:
        if self.keeps_storage:
            self.workspace.layers = [(layer.keys, layer.values) for layer in self.cache.layers]
            _workspaces[self.model] = self.workspace

    def capacity(self) -> int:
        """Rounded up, for few compilations, and no less than the caller's `max_cache_len`."""
        return max(_view(super().capacity()), self.request.generation_config.max_cache_len or 0)

    def reusable_storage(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        # Handed over, so that what does not fit is freed layer by layer, as each takes other memory.
        layers, self.workspace.layers = self.workspace.layers, []
        return layers

    def settle(self) -> None:
        if not self.keeps_storage:
            return
        for layer in filter(lambda layer: layer.is_initialized, self.cache.layers):
            mark_static_address(layer.keys)
            mark_static_address(layer.values)
        state = self.drafting.state
        owners = (
            (self.rows, Rows.STATE),
            (state, state.STATE),
            (self.cache, _CACHE_STATE),
            (self.cache.slots, ("rows",)),
        )
        for owner, name in ((owner, name) for owner, names in owners for name in names):
            key, value = f"{type(owner).__name__}.{name}", getattr(owner, name)
            kept = self.workspace.tensors.get(key)
            if kept is None or (kept.shape, kept.dtype, kept.device) != (value.shape, value.dtype, value.device):
                mark_static_address(value)
                self.workspace.tensors[key] = value
            else:
                setattr(owner, name, kept.copy_(value))

    def decode(self) -> None:
        self.read(self.report(self.bare_root))
        function = _step if self.is_self_contained else _propose
        step = function if self.compile_config is None else _compiled(function, self.compile_config)
        with recompile_limits(*_LIMITS):
            while self.goes_on():
                self.drafting.choose()
                view = min(_view(self.slots_in_use()), self.cache.slots.capacity)
                self.drafting.state.within(view)
                if self.keeps_storage:
                    torch.compiler.cudagraph_mark_step_begin()
                # The first step of some drafters is another one, and not worth a compilation.
                run = step if self.drafting.state.is_ready else function
                try:
                    with nullcontext() if run is function else _compiling:
                        outcome = run(self, view)
                except cant_be_compiled() as error:  # before anything has run
                    logger.warning(
                        f"The step can't be compiled for {type(self.model).__name__}, and runs uncompiled: {error}"
                    )
                    step = function
                    outcome = step(self, view)
                if not self.is_self_contained:
                    tree, root_column, logits, outputs = outcome
                    self.accept(tree, root_column, logits, outputs)
                    outcome = self.report(tree)
                self.read(outcome)
                self.record(self.drafting.choice, self.progress.n_nodes)

    def choose_compile_config(self) -> CompileConfig | None:
        """How to compile, None for not at all. As without a speculator: on CUDA, or where it is asked for.

        Of the caller's `compile_config`, backend, mode and options count: a step is always compiled as a whole, for
        its shapes.
        """
        given, model = self.request.generation_config.compile_config, self.model
        if self.request.generation_config.disable_compile or (self.device.type != "cuda" and given is None):
            return None
        quantizer = getattr(model, "hf_quantizer", None)
        obstacles = {
            "its quantization can't be compiled": quantizer is not None and not quantizer.is_compileable,
            "it is spread over devices": len(set(getattr(model, "hf_device_map", {}).values())) > 1,
            "its weights are sharded": self.request.synced_gpus,
        }
        for reason in (reason for reason, is_so in obstacles.items() if is_so):
            logger.warning_once(f"The step of {type(model).__name__} is not compiled, because {reason}.")
            return None
        check_contract("compile")
        return given or CompileConfig()


def _step(decoder: StaticDecoder, view: int) -> torch.Tensor:
    """Draft, verify, accept, keep: a function of the decoder's tensors, which returns what the host wants to know."""
    return decoder.report(decoder.step(decoder.draft(view), view))


def _propose(decoder: StaticDecoder, view: int) -> tuple[CandidateTree, torch.Tensor, torch.Tensor, object]:
    """Draft and verify."""
    root_column = decoder.rows.root_column
    tree, logits, outputs = decoder.verify(decoder.draft(view), root_column, view)
    return tree, root_column, logits, outputs


def _compiled(function, config: CompileConfig):
    key = function, config.backend, config.mode, repr(config.options)
    if key not in _compiled_functions:
        how = {"backend": config.backend, "mode": config.mode, "options": config.options}
        _compiled_functions[key] = torch.compile(function, fullgraph=True, dynamic=False, **how)
    return _compiled_functions[key]


def _view(slots: int) -> int:
    """The next power of two, or above 1024 the next quarter between two of them: a large cache is bandwidth."""
    power = 1 << (slots - 1).bit_length()
    if power <= 1024:
        return max(_LEAST_VIEW, power)
    quarter = power // 8
    return -(-slots // quarter) * quarter
