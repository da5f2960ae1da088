"""The decoding loop: prefill, then draft, verify, accept and keep, until every row has ended."""

from contextlib import nullcontext

import torch

from .adaptive import AdaptiveSpeculation, choices_of
from .attention import tree_attention, uses_sdpa
from .cache import SpeculativeCache
from .candidate_tree import CandidateTree, max_nodes
from .checks import main_device
from .context_vectors import handed_to_cache
from .emission import Emission
from .families import attention_windows
from .progress import Progress
from .request import Request
from .rows import Rows, at_nodes
from .tracing import Trace
from .transformers_api import CACHE, has_unfinished_sequences, optimized_for_decoding
from .transformers_api import prefill as run_prompt
from .vocabularies import beside


class SpeculativeDecoder:
    """One `generate` call.

    What a step works on lies on the device: the text in `rows`, keys and values in `cache`. The host waits for it once
    per step, in `read`, to learn whether to stop and how large the next tree is. (More often where a processor or a
    criterion reads the text, or a trace is kept.)
    """

    may_be_dense = True  # whether attention looks at no slot that is not in use
    keeps_storage = False  # whether the memory of the cache is used by the next call

    def __init__(self, model, speculator, request: Request):
        self.model, self.speculator, self.request = model, beside(model, speculator), request
        self.device = main_device(model)
        config = speculator.config
        self.n_candidates, self.n_predict = config.n_candidates, config.n_predict
        self.n_tree_nodes = getattr(config, "n_tree_nodes", None)  # a dial that not every drafter has
        self.max_nodes = max_nodes(config)
        adapts = request.is_adaptive and self.n_candidates > 0
        self.policy = AdaptiveSpeculation(choices_of(config)) if adapts else None
        self.progress = Progress(len(request.input_ids), request.streamer)
        self.trace = Trace() if request.traces_speculation else None
        self.hidden_states = []  # if they are to be returned

    # A call

    def run(self) -> None:
        """Decodes; the text is in `rows`."""
        model = self.model
        with handed_to_cache(model):
            self.prefill()
            mode = torch.inference_mode() if self.allows_inference_mode else nullcontext()
            masked = nullcontext() if self.cache.dense else tree_attention(model)
            with masked, optimized_for_decoding(model), mode:
                self.decode()
        if self.request.streamer is not None:
            self.request.streamer.end()

    def prefill(self) -> None:
        """Runs the prompt the model's own way, into our cache, and emits the first token."""
        request, config, capacity = self.request, self.model.config.get_text_config(decoder=True), self.capacity()
        windows, storage = attention_windows(config), self.reusable_storage()
        self.cache = SpeculativeCache(config.num_hidden_layers, capacity, windows, request.past, storage)
        # The loop keeps a cache of its own, whether or not the caller wants one.
        model_kwargs = request.model_kwargs | {"use_cache": True}
        input_ids = request.input_ids.to(self.device).long()
        outputs = run_prompt(self.model, input_ids, request.generation_config, model_kwargs, self.cache)
        self.cache.start_steps(request.prompt_mask.to(self.device), self.max_nodes, self.is_dense())

        context_vectors = self.cache.context_vectors[:, -1:].to(self.device)
        self.rows = Rows(request, config, capacity, self.n_predict, context_vectors, drafts=self.max_nodes > 1)
        self.settle()
        self.emission = Emission(request, self.rows, self.n_predict, vocab_size=outputs.logits.shape[-1])
        self.bare_root = CandidateTree.root_only(self.rows.root)  # the tensor itself, and so whatever it becomes
        if request.returns("hidden_states"):
            self.hidden_states.append(outputs.hidden_states)
        self.emit(self.bare_root, outputs.logits[:, -1:], context_vectors)

    def decode(self) -> None:
        """Draft, verify, accept and keep, until every row has ended.

        The next tree is drafted before the host reads what the last step did: one wait tells of both. In the end one
        draft is not used.
        """
        self.choose()
        tree = self.draft()
        self.read(self.report(tree))
        while self.goes_on():
            n_candidates, n_nodes = self.n_candidates, self.progress.n_nodes
            self.step(tree.trim(max(n_nodes)), self.slots_in_use())
            self.choose()
            tree = self.draft()
            self.read(self.report(tree))
            self.record(n_candidates, n_nodes)

    def retire(self) -> None:
        """Ends the use of the decoder's memory, once the output has been built from it."""

    # A step, on the device

    def draft(self) -> CandidateTree:
        """Drafts after each row's last token, and merges the candidates into one tree per row."""
        root, context_vector = self.rows.root, self.rows.context_vector
        if self.n_candidates == 0:
            return self.bare_root
        if self.n_tree_nodes is not None:
            drafted = self.speculator.generate_tree(context_vector, root, self.n_tree_nodes)
            return CandidateTree.from_parents(root, *drafted, max_depth=self.n_predict)
        dial = {} if self.policy is None else {"n_candidates": self.n_candidates}
        candidates = self.speculator.generate_candidates(context_vector, root, **dial)
        batch, n_candidates, depth = candidates.shape
        if batch != len(root) or n_candidates > self.n_candidates or depth > self.n_predict:
            raise ValueError(
                f"The speculator drafted {tuple(candidates.shape)} tokens, more than its config's "
                f"{(len(root), self.n_candidates, self.n_predict)}: batch, `n_candidates`, `n_predict`."
            )
        return CandidateTree.merge(root, candidates, self.max_nodes)

    def step(self, tree: CandidateTree, in_use: int) -> None:
        """Verifies a tree, emits what is accepted, and keeps its keys and values."""
        root_column = self.rows.root_column
        outputs = self.verify(tree, root_column, in_use)
        self.accept(tree, root_column, outputs)

    def verify(self, tree: CandidateTree, root_column: torch.Tensor, in_use: int):
        """One forward of the base model over all nodes, each attending to its sequence and its ancestors."""
        return self.model(
            input_ids=tree.input_ids,
            attention_mask=self.cache.prepare_step(tree, root_column, in_use),
            position_ids=self.rows.positions(tree.depths),
            use_cache=True,
            return_dict=True,
            **{CACHE: self.cache},
            **self.rows.types_of(tree.input_ids),
            **({"output_hidden_states": True} if self.request.returns("hidden_states") else {}),
        )

    def accept(self, tree: CandidateTree, root_column: torch.Tensor, outputs) -> None:
        """Emits the accepted tokens, keeps their keys and values, and frees the slots of the others."""
        kept = self.emit(tree, outputs.logits, self.cache.context_vectors)
        self.cache.keep(self.verified.nodes, kept, root_column)
        if self.trace is not None:
            self.trace.record(tree, outputs.logits, self.verified)
        if self.request.returns("hidden_states"):
            nodes = self.verified.nodes  # (batch, depth + 1)
            self.hidden_states.append(tuple(at_nodes(layer, nodes) for layer in outputs.hidden_states))

    def emit(self, tree: CandidateTree, logits: torch.Tensor, context_vectors: torch.Tensor) -> torch.Tensor:
        """Accepts a path, writes its tokens, and moves the root to the last of them; how many nodes are kept."""
        self.verified, budget = self.emission.accept(logits.to(self.device), tree)
        return self.rows.advance(self.verified, budget, context_vectors)

    # Between steps, on the host

    def choose(self) -> None:
        """Decides how many candidates are drafted next."""
        if self.policy is not None:
            self.n_candidates = self.policy.choose()

    def report(self, tree: CandidateTree) -> torch.Tensor:
        """What the host wants to know of a step, and of the tree that comes next."""
        return self.progress.report(self.rows, self.verified, self.emission.drawable, tree)

    def read(self, report: torch.Tensor) -> None:
        """The one time in a step that the host waits for the device."""
        self.progress.read(report, self.emission.drawable is not None)

    def record(self, n_candidates: int, n_nodes: list[int]) -> None:
        """Notes a step that has been read, and what was drafted for it."""
        tokens_per_row = self.progress.record(n_candidates, n_nodes)
        if self.policy is not None:
            self.policy.record(n_candidates, tokens_per_row)

    def goes_on(self) -> bool:
        """Whether to make another step. Where models are sharded, other processes may need our forwards."""
        ended = not self.progress.unfinished
        return has_unfinished_sequences(self.model, ended, self.request.synced_gpus, self.device)

    def slots_in_use(self) -> int:
        """One past the highest slot of the cache that the next nodes may take."""
        return self.progress.longest - 1 + self.rows.in_cache_only + self.max_nodes

    # What a static decoder does otherwise, and what may be left out

    def capacity(self) -> int:
        """Slots of the cache: the text but its last token, and the nodes of one tree."""
        return self.request.context_length + self.request.budget - 1 + self.max_nodes

    def reusable_storage(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer that an earlier call has left for this one: none."""
        return []

    def settle(self) -> None:
        """Moves the state to where it is to stay: it is there already."""

    def is_dense(self) -> bool:
        """Whether every node attends to every slot in use, so that no mask is needed."""
        windows, request = self.cache.windows.values(), self.request
        windowed = any(window is not None and window < self.capacity() for window in windows)
        is_plain = self.max_nodes == 1 and request.model_kwargs.get("attention_mask") is None and not windowed
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
