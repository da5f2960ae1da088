"""A drafter at work in one call: how much it drafts for the next step, and by which of its dials."""

from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import Cache

from .adaptive import AdaptiveSpeculation, Choice, choices_of
from .cache import SpeculativeCache
from .candidate_tree import CandidateTree, max_nodes
from .drafter_state import Call, DrafterState, LastContextVector, Prompt
from .lookup import continuation, longest_draft, lookup_tokens
from .rows import Rows
from .vocabularies import beside


class Drafting:
    """Drafts trees for a base model.

    Attributes:
        choice: how much is drafted for the next tree.
        depth: the most tokens of a path.
        max_nodes: the most nodes of a tree, its root included.
        most_verified: the most of them that the base model verifies.
        reads_prompt: whether the drafter wants to know the tokens before the first.
        guest_slots: of each layer of the base model in which it has rows of its own, slots for these.
        feature_layers: layers of the base model, the input of which it wants to know.
        state: what it knows of this call.

    Args:
        adapts: whether to choose `n_candidates` from what steps are found to gain and to cost.
    """

    def __init__(self, model, speculator, adapts: bool):
        self.speculator, config = beside(model, speculator), speculator.config
        self.choice, self.n_predict = Choice(config.n_candidates, lookup_tokens(config)), config.n_predict
        self.n_tree_nodes = getattr(config, "n_tree_nodes", None)  # a dial that not every drafter has
        self.depth = longest_draft(config)
        self.most_drafted = max_nodes(config)  # by the drafter itself, the root included
        self.max_nodes = self.most_drafted + self.choice.n_lookup_tokens
        self.most_verified = getattr(config, "n_kept_nodes", None) or self.max_nodes
        self.is_on = self.choice.n_candidates > 0
        self.reads_prompt = self.is_on and getattr(self.speculator, "reads_prompt", False)
        n_slots = getattr(self.speculator, "guest_slots", lambda max_nodes: {})
        self.guest_slots = n_slots(self.max_nodes) if self.is_on else {}
        self.feature_layers = tuple(getattr(config, "feature_layers", None) or ()) if self.is_on else ()
        self.state = DrafterState()
        self.policy = AdaptiveSpeculation(choices_of(config)) if adapts and self.is_on else None

    def guests_allowed(self) -> AbstractContextManager:
        """What must surround a call in which the drafter adds to the base model's forwards."""
        return self.speculator.guests_allowed() if self.guest_slots else nullcontext()

    def start(self, cache: SpeculativeCache, rows: Rows, past: Cache | None) -> None:
        """Begins to take note of what is verified, once the prompt has been read."""
        if not self.is_on or self.n_predict == 0:
            return
        start = getattr(self.speculator, "start", LastContextVector)  # which drafters of somebody's own may lack
        context_vector = cache.context_vectors[:, -1:].to(rows.root.device)
        self.state = start(Call(context_vector, cache.slots.capacity + self.depth + 1, rows.offsets, past))

    def read_prompt(self, cache: SpeculativeCache, rows: Rows, prompt_mask: torch.Tensor) -> None:
        """Takes note of the prompt and the first token."""
        if self.reads_prompt:
            mask = prompt_mask.to(rows.root.device).bool()
            tokens, are_text = rows.tokens_after(mask.shape[1])
            first_column = tokens.shape[1] - cache.context_vectors.shape[1]
            self.state.prefill(Prompt(tokens, mask, mask & are_text, first_column), cache)

    def choose(self) -> None:
        """Decides how much is drafted next."""
        if self.policy is not None:
            self.choice = self.policy.choose()

    def record(self, choice: Choice, tokens_per_row: float) -> None:
        """Learns from a step that has been read."""
        if self.policy is not None:
            self.policy.record(choice, tokens_per_row)

    def tree(self, rows: Rows, columns: int) -> CandidateTree:
        """Drafts after each row's last token: one tree per row, with what the text's own repetitions say.

        Args:
            columns: no row is longer.

        Raises:
            ValueError: if a drafter of somebody's own returns more than its config says.
        """
        tree, n_lookup_tokens = self.drafted(rows), self.choice.n_lookup_tokens
        if n_lookup_tokens == 0:
            return tree
        text, readable = rows.sequences[:, :columns], rows.readable[:, :columns]
        return tree.graft(*continuation(text, readable, rows.lengths, n_lookup_tokens))

    def drafted(self, rows: Rows) -> CandidateTree:
        """The drafter's own tree: its candidates merged."""
        root, context_vector = rows.root, self.state.context_vector
        if self.n_predict == 0 or not self.state.is_ready:
            return CandidateTree.root_only(root)
        if self.n_tree_nodes is not None:
            drafted = self.speculator.generate_tree(context_vector, root, self.n_tree_nodes)
            return CandidateTree.from_parents(root, *drafted, max_depth=self.n_predict)
        dial = {} if self.policy is None else {"n_candidates": self.choice.n_candidates}
        candidates = self.speculator.generate_candidates(context_vector, root, **dial)
        batch, n_candidates, depth = candidates.shape
        if batch != len(root) or n_candidates > self.choice.n_candidates or depth > self.n_predict:
            raise ValueError(
                f"The speculator drafted {tuple(candidates.shape)} tokens, more than its config's "
                f"{(len(root), self.choice.n_candidates, self.n_predict)}: batch, `n_candidates`, `n_predict`."
            )
        return CandidateTree.merge(root, candidates, self.most_drafted)
