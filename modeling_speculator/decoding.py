"""The decoding loop: prefill, then draft, verify, accept and keep, until every row has ended."""

from contextlib import nullcontext

import torch

from .adaptive import Choice
from .attention import tree_attention, uses_sdpa
from .cache import SpeculativeCache
from .candidate_tree import CandidateTree
from .checks import main_device
from .context_vectors import handed_to_cache
from .drafter_state import at_nodes
from .drafting import Drafting
from .emission import Emission
from .families import attention_windows, shares_keys
from .progress import Progress
from .request import Request
from .rows import Rows
from .tracing import Trace
from .transformers_api import CACHE, has_unfinished_sequences, optimized_for_decoding
from .transformers_api import prefill as run_prompt


class SpeculativeDecoder:
    """One `generate` call.

    What a step works on lies on the device: the text in `rows`, keys and values in `cache`. The host waits for it once
    per step, in `read`, to learn whether to stop and how large the next tree is. (More often where a processor or a
    criterion reads the text, or a trace is kept.)
    """

    may_be_dense = True  # whether attention looks at no slot that is not in use
    keeps_storage = False  # whether the memory of the cache is used by the next call

    def __init__(self, model, speculator, request: Request):
        self.model, self.request, self.device = model, request, main_device(model)
        self.drafting = Drafting(model, speculator, request.is_adaptive)
        if request.returns("hidden_states") and self.drafting.most_verified < self.drafting.max_nodes:
            raise ValueError(
                "Nodes that are pruned have no hidden states in the upper layers: leave out `output_hidden_states`, "
                "or set `speculator.config.n_kept_nodes = None`."
            )
        self.progress = Progress(*request.input_ids.shape, request.streamer)
        self.trace = Trace() if request.traces_speculation else None
        self.hidden_states = []  # if they are to be returned

    # A call

    def run(self) -> None:
        """Decodes; the text is in `rows`."""
        model = self.model
        with handed_to_cache(model, self.drafting.feature_layers), self.drafting.guests_allowed():
            self.prefill()
            mode = torch.inference_mode() if self.allows_inference_mode else nullcontext()
            masked = nullcontext() if self.cache.dense else tree_attention(model)
            with masked, optimized_for_decoding(model), mode:
                self.decode()
        if self.request.streamer is not None:
            self.request.streamer.end()

    def prefill(self) -> None:
        """Runs the prompt the model's own way, into our cache, and emits the first token."""
        request, capacity = self.request, self.capacity()
        depth, max_nodes = self.drafting.depth, self.drafting.max_nodes
        self.cache = self.make_cache(capacity)
        # The loop keeps a cache of its own, whether or not the caller wants one.
        model_kwargs = request.model_kwargs | {"use_cache": True}
        if self.drafting.reads_prompt and shares_keys(self.model):  # it wants all context vectors
            model_kwargs |= {"logits_to_keep": 0}
        input_ids = request.input_ids.to(self.device).long()
        outputs = run_prompt(self.model, input_ids, request.generation_config, model_kwargs, self.cache)
        self.cache.start_steps(request.prompt_mask.to(self.device), max_nodes, self.is_dense())

        self.rows = Rows(request, self.model.config, capacity, depth, self.device, drafts=max_nodes > 1)
        self.drafting.start(self.cache, self.rows, request.past)
        self.settle()
        self.emission = Emission(request, self.rows, depth, vocab_size=outputs.logits.shape[-1])
        self.bare_root = CandidateTree.root_only(self.rows.root)  # the tensor itself, and so whatever it becomes
        if request.returns("hidden_states"):
            self.hidden_states.append(outputs.hidden_states)
        self.emit(self.bare_root, outputs.logits[:, -1:])
        self.drafting.read_prompt(self.cache, self.rows, request.prompt_mask)

    def make_cache(self, capacity: int) -> SpeculativeCache:
        """For so many slots a row."""
        config, request = self.model.config.get_text_config(decoder=True), self.request
        windows, storage = attention_windows(config), self.reusable_storage()
        keeps_prompt, guest_slots = self.drafting.reads_prompt, self.drafting.guest_slots
        return SpeculativeCache(
            config.num_hidden_layers, capacity, windows, request.past, storage, keeps_prompt, guest_slots
        )

    def decode(self) -> None:
        """Draft, verify, accept and keep, until every row has ended.

        The next tree is drafted before the host reads what the last step did: one wait tells of both. In the end one
        draft is not used.
        """
        self.drafting.choose()
        tree = self.draft_next()
        self.read(self.report(tree))
        while self.goes_on():
            choice, n_nodes = self.drafting.choice, self.progress.n_nodes
            self.step(tree.trim(max(n_nodes)), self.slots_in_use())
            self.drafting.choose()
            tree = self.draft_next()
            self.read(self.report(tree))
            self.record(choice, [min(n, self.drafting.most_verified) for n in n_nodes])

    def draft_next(self) -> CandidateTree:
        columns = self.longest_possible()
        self.drafting.state.within(columns + self.rows.in_cache_only)
        return self.draft(columns)

    def retire(self) -> None:
        """Ends the use of the decoder's memory, once the output has been built from it."""

    # A step, on the device

    def draft(self, columns: int) -> CandidateTree:
        """One tree per row, after its last token; no row is longer than some columns."""
        if self.drafting.choice.n_candidates == 0:
            return self.bare_root
        return self.drafting.tree(self.rows, columns)

    def step(self, tree: CandidateTree, in_use: int) -> CandidateTree:
        """Verifies a tree, emits what is accepted, and keeps its keys and values; the tree that was verified."""
        root_column = self.rows.root_column
        tree, logits, outputs = self.verify(tree, root_column, in_use)
        self.accept(tree, root_column, logits, outputs)
        return tree

    def verify(self, tree: CandidateTree, root_column: torch.Tensor, in_use: int):
        """One forward of the base model over all nodes, each attending to its sequence and its ancestors.

        Returns:
            The tree that was verified, the logits of its nodes, and what the forward has returned.
        """
        masks = self.cache.prepare_step(tree, root_column, in_use)
        with self.drafting.state.beside_nodes(tree, masks, self.cache):
            outputs = self.model(
                input_ids=tree.input_ids,
                attention_mask=masks,
                position_ids=self.rows.positions(tree.depths),
                use_cache=True,
                return_dict=True,
                **{CACHE: self.cache},
                **self.rows.types_of(tree.input_ids),
                **({"output_hidden_states": True} if self.request.returns("hidden_states") else {}),
            )
        return *self.drafting.state.verified(tree, outputs.logits), outputs

    def accept(self, tree: CandidateTree, root_column: torch.Tensor, logits: torch.Tensor, outputs) -> None:
        """Emits the accepted tokens, keeps their keys and values, and frees the slots of the others."""
        kept = self.emit(tree, logits)
        self.drafting.state.extend(self.verified, self.cache, root_column)
        self.keep(kept, root_column)
        if self.trace is not None:
            self.trace.record(tree, logits, self.verified)
        if self.request.returns("hidden_states"):
            nodes = self.verified.nodes  # (batch, depth + 1)
            self.hidden_states.append(tuple(at_nodes(layer, nodes) for layer in outputs.hidden_states))

    def keep(self, kept: torch.Tensor, root_column: torch.Tensor) -> None:
        """Keeps the first nodes (batch,) of the accepted path in the cache."""
        self.cache.keep(self.verified.nodes, kept, root_column)

    def emit(self, tree: CandidateTree, logits: torch.Tensor) -> torch.Tensor:
        """Accepts a path, writes its tokens, and moves the root to the last of them; how many nodes are kept."""
        self.verified, budget = self.emission.accept(logits.to(self.device), tree)
        return self.rows.advance(self.verified, budget)

    # Between steps, on the host

    def report(self, tree: CandidateTree) -> torch.Tensor:
        """What the host wants to know of a step, and of the tree that comes next."""
        return self.progress.report(self.rows, self.verified, self.emission.drawable, tree)

    def read(self, report: torch.Tensor) -> None:
        """The one time in a step that the host waits for the device."""
        self.progress.read(report, self.emission.drawable is not None)

    def record(self, choice: Choice, n_nodes: list[int]) -> None:
        """Notes a step that has been read, and what was drafted for it."""
        self.drafting.record(choice, self.progress.record(choice.n_candidates, n_nodes))

    def goes_on(self) -> bool:
        """Whether to make another step. Where models are sharded, other processes may need our forwards."""
        ended = not self.progress.unfinished
        return has_unfinished_sequences(self.model, ended, self.request.synced_gpus, self.device)

    def longest_possible(self) -> int:
        """Columns that the longest row has at most, before the host has read what the last step emitted."""
        return self.progress.longest + self.drafting.depth + 1

    def slots_in_use(self) -> int:
        """One past the highest slot of the cache that the next nodes may take."""
        return self.progress.longest - 1 + self.rows.in_cache_only + self.drafting.max_nodes

    # What a static decoder does otherwise, and what may be left out

    def capacity(self) -> int:
        """Slots of the cache: the text but its last token, and the nodes of one tree."""
        return self.request.context_length + self.request.budget - 1 + self.drafting.max_nodes

    def reusable_storage(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer that an earlier call has left for this one: none."""
        return []

    def settle(self) -> None:
        """Moves the state to where it is to stay: it is there already."""

    def is_dense(self) -> bool:
        """Whether every node attends to every slot in use, so that no mask is needed."""
        windows, request = self.cache.windows.values(), self.request
        windowed = any(window is not None and window < self.capacity() for window in windows)
        is_plain = self.drafting.max_nodes == 1 and request.model_kwargs.get("attention_mask") is None and not windowed
        return is_plain and uses_sdpa(self.model) and self.may_be_dense

    @property
    def is_self_contained(self) -> bool:
        """Whether a step is a function of our tensors alone: no Python of others, nothing that is kept of it."""
        keeps_some = self.trace is not None or self.request.returns("hidden_states")
        return self.emission.walk is None and not keeps_some

    @property
    def allows_inference_mode(self) -> bool:
        """Whether a step may run so, in a tenth less time than in `no_grad` where the host is the limit.

        What a user's code is given, gets to keep, or may keep in the base model to train on, must be ordinary tensors.
        """
        request = self.request
        given_to_others = request.streamer is not None or request.synced_gpus or self.model.training
        return self.is_self_contained and not given_to_others
