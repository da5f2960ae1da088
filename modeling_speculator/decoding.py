"""The decoding loop: prefill, then draft, verify, accept, until every sequence has ended."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from .adaptive import AdaptiveSpeculation
from .attention import tree_attention, uses_sdpa
from .cache import SpeculativeCache
from .candidate_tree import CandidateTree
from .checks import main_device
from .context_vectors import handed_to_cache
from .families import EMBEDDED_TOKEN_TYPES, attention_windows
from .request import Request
from .sampling import SCORES_ONLY, TokenDraw, check_drawable, draw_row_keys
from .transformers_api import CACHE, has_unfinished_sequences, optimized_for_decoding, prefill
from .verification import accept_drawn, cut_at_end
from .vocabularies import beside
from .walk import Walk, treats_rows_apart


class StepRecord(NamedTuple):
    """n_candidates: what was drafted; n_nodes, n_emitted: of each row, nodes verified and tokens emitted."""

    n_candidates: int
    n_nodes: list[int]
    n_emitted: list[int]


class SpeculativeDecoder:
    """One `generate` call.

    All state lives on the device, in tensors that stay where they are, one row per sequence, each with a length of its
    own. The host waits for the device once per step, to learn whether to stop and how large the next tree is.
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
        self.policy = AdaptiveSpeculation(_choices(config)) if adapts else None
        self.steps: list[StepRecord] = []
        self.hidden_states = []  # if they are to be returned

    def run(self) -> None:
        """Decodes; the text is in `sequences`, of `lengths` columns each."""
        model, request = self.model, self.request
        with handed_to_cache(model):
            self.prefill()
            mode = torch.inference_mode() if self.allows_inference_mode else nullcontext()
            masked = nullcontext() if self.cache.dense else tree_attention(model)
            with masked, optimized_for_decoding(model), mode:
                self.decode()
        if request.streamer is not None:
            request.streamer.end()

    def retire(self) -> None:
        """Ends the use of the decoder's memory, once the output has been built from it."""

    def prefill(self) -> None:
        """Runs the prompt the model's own way, into our cache, and emits the first token."""
        model, request = self.model, self.request
        input_ids = request.input_ids.to(self.device).long()
        batch, length = input_ids.shape
        config = model.config.get_text_config(decoder=True)
        windows = attention_windows(config)
        capacity = self.capacity()
        self.cache = SpeculativeCache(
            config.num_hidden_layers, capacity, windows, request.past, self.reusable_storage()
        )
        # The loop keeps a cache of its own, whether or not the caller wants one.
        model_kwargs = request.model_kwargs | {"use_cache": True}
        outputs = prefill(model, input_ids, request.generation_config, model_kwargs, self.cache)
        mask = request.model_kwargs.get("attention_mask")
        windowed = any(window is not None and window < capacity for window in windows.values())
        dense = self.max_nodes == 1 and mask is None and not windowed and uses_sdpa(model) and self.may_be_dense
        if mask is None:
            mask = input_ids.new_ones(batch, request.context_length)
        self.cache.start_steps(mask.to(self.device), self.max_nodes, dense)

        self.prompt_length = length
        self.in_cache_only = request.context_length - length
        self.to_root_column = torch.full((1, 1), self.in_cache_only - 1, device=self.device)  # from a text's length
        self.lengths = torch.full((batch, 1), length, device=self.device)  # columns of text, padding included
        self.from_length = request.last_positions.to(self.device) - length  # of a text to its last token's position
        self.last_position = self.from_length + length + request.budget - 1  # the last token is never run
        self.budget = torch.full((batch,), request.budget, device=self.device)
        adds_types = config.model_type in EMBEDDED_TOKEN_TYPES and request.last_token_types is not None
        self.token_types = request.last_token_types.to(self.device) if adds_types else None
        self.eos_token_ids = None if request.eos_token_ids is None else request.eos_token_ids.to(self.device)
        # Room for what a step writes past a row's end; it is overwritten by the next step, or cut off in the end.
        self.sequences = input_ids.new_zeros(batch, capacity + self.n_predict + 1)
        self.sequences[:, :length] = input_ids
        self.along = torch.arange(self.n_predict + 1, device=self.device)
        self.root = self.sequences.new_zeros(batch, 1)
        context_vectors = self.cache.context_vectors[:, -1:]
        self.context_vector = context_vectors.to(self.device).clone(memory_format=torch.contiguous_format)
        self.settle()

        self.prepare_draws(outputs.logits.shape[-1])
        self.drawable = None  # (batch, depth + 1), whether each emitted token could be sampled
        self.bare_root = CandidateTree.root_only(self.root)  # which holds `root` itself, and so whatever it becomes
        if request.returns("hidden_states"):
            self.hidden_states.append(outputs.hidden_states)
        self.emit(self.bare_root, outputs.logits[:, -1:], context_vectors)

    def reusable_storage(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer that an earlier call has left for this one: none."""
        return []

    def settle(self) -> None:
        """Moves the state to where it is to stay: it is there already."""

    @property
    def is_self_contained(self) -> bool:
        """Whether a step is a function of our tensors alone: no Python of others, nothing that is kept of it."""
        return self.walk is None and not self.request.returns("hidden_states")

    @property
    def allows_inference_mode(self) -> bool:
        """Whether a step may run so, in a tenth less time than in `no_grad` where the host is the limit.

        What a user's code is given, gets to keep, or may keep in the base model to train on, must be ordinary tensors.
        """
        request = self.request
        given_to_others = request.streamer is not None or request.synced_gpus or self.model.training
        return self.is_self_contained and not given_to_others

    def capacity(self) -> int:
        """Slots of the cache: the text but its last token, and the nodes of one tree."""
        return self.request.context_length + self.request.budget - 1 + self.max_nodes

    def prepare_draws(self, vocab_size: int) -> None:
        """Decides how tokens are drawn: all nodes at once, or along a walk."""
        request, batch = self.request, len(self.sequences)
        processors, criteria = list(request.logits_processor), request.stopping_criteria
        row_keys = draw_row_keys(batch, self.device) if request.generation_config.do_sample else None
        self.draw, self.walk = TokenDraw(processors, row_keys, vocab_size, self.n_predict), None
        record = {f"record_{what}": request.returns(what) for what in ("scores", "logits")}
        at_once = all(type(processor) in SCORES_ONLY for processor in processors) and all(
            type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in criteria
        )
        streams_rows = request.streamer is not None and batch > 1  # it is given a token of every row at a time
        if not at_once or streams_rows or any(record.values()):
            # Without a draft no row is ever ahead of the others, and one call serves all.
            together = streams_rows or self.max_nodes == 1 or not treats_rows_apart(processors, criteria)
            self.walk = Walk(
                processors,
                criteria,
                self.draw,
                self.sequences,
                self.prompt_length,
                together=together,
                pad_token_id=request.pad_token_id,
                **record,
            )

    def decode(self) -> None:
        """Draft, verify, accept, until every row has ended."""
        self.choose()
        tree = self.draft()
        self.read(self.report(tree))
        while self.goes_on():
            n_candidates, n_nodes = self.n_candidates, self.n_nodes
            self.step(tree.trim(max(n_nodes)), self.longest - 1 + self.in_cache_only + self.max_nodes)
            self.choose()
            tree = self.draft()
            self.read(self.report(tree))
            self.record(n_candidates, n_nodes)

    def goes_on(self) -> bool:
        """Whether to make another step. Where models are sharded, other processes may need our forwards."""
        return has_unfinished_sequences(self.model, not self.unfinished, self.request.synced_gpus, self.device)

    def choose(self) -> None:
        """Decides how many candidates are drafted next."""
        if self.policy is not None:
            self.n_candidates = self.policy.choose()

    def draft(self) -> CandidateTree:
        """Drafts after each row's last token, and merges the candidates into one tree per row."""
        if self.n_candidates == 0:
            return self.bare_root
        if self.n_tree_nodes is not None:
            drafted = self.speculator.generate_tree(self.context_vector, self.root, self.n_tree_nodes)
            return CandidateTree.from_parents(self.root, *drafted, max_depth=self.n_predict)
        dial = {} if self.policy is None else {"n_candidates": self.n_candidates}
        candidates = self.speculator.generate_candidates(self.context_vector, self.root, **dial)
        batch, n_candidates, depth = candidates.shape
        if batch != len(self.root) or n_candidates > self.n_candidates or depth > self.n_predict:
            raise ValueError(
                f"The speculator drafted {tuple(candidates.shape)} tokens, more than its config's "
                f"{(len(self.root), self.n_candidates, self.n_predict)}: batch, `n_candidates`, `n_predict`."
            )
        return CandidateTree.merge(self.root, candidates, self.max_nodes)

    def step(self, tree: CandidateTree, in_use: int) -> None:
        """Verifies a tree, emits what is accepted, and keeps its keys and values."""
        root_column = self.lengths + self.to_root_column
        outputs = self.verify(tree, root_column, in_use)
        self.accept(tree, root_column, outputs)

    def verify(self, tree: CandidateTree, root_column: torch.Tensor, in_use: int):
        """One forward of the base model over all nodes, each attending to its sequence and its ancestors."""
        return self.model(
            input_ids=tree.input_ids,
            attention_mask=self.cache.prepare_step(tree, root_column, in_use),
            # Nodes past the last token that can be emitted are never accepted; their positions may not exist.
            position_ids=torch.minimum(self.lengths + self.from_length + tree.depths, self.last_position),
            use_cache=True,
            return_dict=True,
            **{CACHE: self.cache},
            **self.types_of(tree.input_ids),
            **({"output_hidden_states": True} if self.request.returns("hidden_states") else {}),
        )

    def types_of(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a forward over new tokens (batch, n) needs where the prompt has token types: all have its last one."""
        return {} if self.token_types is None else {"token_type_ids": self.token_types.expand_as(input_ids)}

    def accept(self, tree: CandidateTree, root_column: torch.Tensor, outputs) -> None:
        """Emits the accepted tokens, keeps their keys and values, and frees the slots of the others."""
        self.emit(tree, outputs.logits, self.cache.context_vectors)
        if self.request.returns("hidden_states"):
            nodes = self.verified.nodes  # (batch, depth + 1)
            self.hidden_states.append(tuple(_at_nodes(layer, nodes) for layer in outputs.hidden_states))
        self.cache.keep(self.verified.nodes, self.n_kept, root_column)

    def emit(self, tree: CandidateTree, logits: torch.Tensor, context_vectors: torch.Tensor) -> None:
        """Accepts a path, writes its tokens, and moves the root to the last of them."""
        logits = logits.to(self.lengths.device)
        if self.walk is None:
            drawn, drawable = self.draw.at_nodes(logits, tree.depths, tree.max_depth, self.lengths)
            verified, budget = cut_at_end(accept_drawn(drawn, tree), self.eos_token_ids, self.budget)
            along = self.along[: tree.max_depth + 1]
            self.sequences.scatter_(1, self.lengths + along, verified.tokens)
            if drawable is not None:
                self.drawable = drawable.gather(1, verified.nodes) | (along >= verified.n_tokens[:, None])
        else:
            verified, unfinished = self.walk.accept(logits, tree)
            budget = torch.where(unfinished, self.budget - verified.n_tokens, 0)
        tokens, nodes, n_tokens = verified
        if self.max_nodes == 1:
            # As in `generate`: a row that has ended goes on with padding, until all have.
            tokens = tokens.masked_fill(n_tokens[:, None] == 0, self.request.pad_token_id)
            self.sequences.scatter_(1, self.lengths, tokens)
            n_tokens = n_tokens.amax().expand_as(n_tokens)
        elif tree.max_depth > 0:
            last = (n_tokens[:, None] - 1).clamp(min=0)  # 0 tokens: the row has ended, and its draft is not used
            tokens, nodes = tokens.gather(1, last), nodes.gather(1, last)
        self.lengths.add_(n_tokens[:, None])
        self.budget.copy_(budget)
        self.root.copy_(tokens)
        if self.max_nodes > 1:
            self.context_vector.copy_(_at_nodes(context_vectors, nodes))
        self.verified, self.n_kept = verified, n_tokens

    def report(self, tree: CandidateTree) -> torch.Tensor:
        """All that the host wants to know of a step, as one tensor: what was emitted, and the size of a tree."""
        parts = [self.budget, self.lengths[:, 0], self.verified.n_tokens, tree.n_nodes]
        if self.drawable is not None:
            parts.append(self.drawable.all(-1))
        if self.request.streamer is not None:
            parts.append(self.verified.tokens.T.flatten())
        return torch.cat(parts)

    def read(self, report: torch.Tensor) -> None:
        """The one time in a step that the host waits for the device."""
        numbers, batch = report.tolist(), len(self.sequences)
        budget, lengths, self.n_emitted, self.n_nodes, *rest = (
            numbers[i : i + batch] for i in range(0, len(numbers), batch)
        )
        if self.drawable is not None:
            check_drawable(all(rest.pop(0)))
        self.unfinished, self.longest = any(budget), max(lengths)
        if self.request.streamer is not None:
            for tokens in rest[: max(self.n_emitted)]:
                self.request.streamer.put(torch.tensor(tokens))

    def record(self, n_candidates: int, n_nodes: list[int]) -> None:
        """Notes a step that has been read, and what was drafted for it."""
        self.steps.append(StepRecord(n_candidates, n_nodes, self.n_emitted))
        if self.policy is not None:
            rows = sum(n > 0 for n in self.n_emitted)
            self.policy.record(n_candidates, sum(self.n_emitted) / max(1, rows))

    def text(self) -> torch.Tensor:
        """(batch, longest), padded where rows have ended before."""
        sequences = self.sequences[:, : self.longest]
        past_end = torch.arange(self.longest, device=sequences.device) >= self.lengths
        return sequences.masked_fill(past_end, self.request.pad_token_id).to(self.request.input_ids.device)


def max_nodes(config) -> int:
    """The most nodes that the tree of a speculator with this config can have, the root included."""
    if config.n_candidates > 0 and getattr(config, "n_tree_nodes", None) is not None:
        return 1 + config.n_tree_nodes
    top_k = getattr(config, "top_k_tokens_per_head", None)
    nodes, leaves = 1, 1
    for head in range(getattr(config, "n_heads", None) or config.n_predict):
        leaves = leaves * top_k[head] if top_k else config.n_candidates
        nodes += min(config.n_candidates, leaves)
    return nodes


def _choices(config) -> list[int]:
    """What adaptive speculation picks from: nothing, a single candidate, and what the dials say."""
    few = [1] if getattr(config, "n_tree_nodes", None) is None else []  # a tree of best nodes has one size
    return sorted({0, *few, config.n_candidates})


def _at_nodes(vectors: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    """(batch, nodes, size) at (batch, n) -> (batch, n, size)."""
    return vectors.gather(1, nodes.to(vectors.device)[:, :, None].expand(-1, -1, vectors.shape[-1]))
