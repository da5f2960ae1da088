"""A drafter at work in one call: how much it drafts for the next step, and by which of its dials."""

from .adaptive import AdaptiveSpeculation, Choice, choices_of
from .candidate_tree import CandidateTree, max_nodes
from .lookup import continuation, longest_draft, lookup_tokens
from .rows import Rows
from .vocabularies import beside


class Drafting:
    """Drafts trees for a base model.

    Attributes:
        choice: how much is drafted for the next tree.
        depth: the most tokens of a path.
        max_nodes: the most nodes of a tree, its root included.

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
        self.policy = AdaptiveSpeculation(choices_of(config)) if adapts and self.choice.n_candidates > 0 else None

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
        root, context_vector = rows.root, rows.context_vector
        if self.n_predict == 0:
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
