"""Candidates' selection: what the heads think likely, as drafted sequences or as the best nodes of a tree."""

from contextlib import AbstractContextManager

import torch

from .cells import Cell
from .configuration_mlp_speculator import MLPSpeculatorConfig
from .drafter_state import Call, DrafterState


class CandidateSelection:
    """How a drafter of heads drafts, by the dials of its config.

    Attributes:
        config: its dials.
        speculator: its heads.
    """

    config: MLPSpeculatorConfig
    speculator: Cell

    def beside(self, base_model) -> "CandidateSelection":
        """What drafts for a base model: itself, or its heads bound to that one where they use layers of it."""
        return self._as(self.speculator.bound(base_model))

    def _as(self, cell: Cell) -> "CandidateSelection":
        return self if cell is self.speculator else BoundSelection(self.config, cell)

    @property
    def reads_text(self) -> bool:
        """Whether it wants to know all verified tokens, and not the last context vector alone."""
        return self.speculator.reads_text

    @property
    def reads_prompt(self) -> bool:
        """Whether its state in a call wants to know those of the prompt."""
        return self.speculator.reads_prompt

    @property
    def copied_per_place(self) -> int:
        """Numbers that `at_places` copies for each place."""
        return self.speculator.copied_per_place

    @property
    def drafts_after_prompt(self) -> bool:
        """Whether its first draft is before the first step, and not after it."""
        return self.speculator.drafts_after_prompt

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Layers of the base model, what enters which is read, too, where it reads texts."""
        return self.speculator.feature_layers

    def start(self, call: Call) -> DrafterState:
        """What is known of the tokens of a call of `generate`."""
        return self.speculator.start(call)

    def guest_slots(self, max_nodes: int) -> dict[int, int]:
        """Slots for rows of its own, in each layer of the base model where a forward over so many nodes has some."""
        return self.speculator.guest_slots(max_nodes)

    def guests_allowed(self) -> AbstractContextManager:
        """What must surround forwards with rows of its own."""
        return self.speculator.guests_allowed()

    def with_context(self, *text: torch.Tensor | None) -> torch.Tensor:
        """`Cell.with_context`: what a draft starts from at all places of a text at once."""
        return self.speculator.with_context(*text)

    def between(self, start: int, end: int, n: int) -> "CandidateSelection":
        """After `with_context`: what drafts at some of the last `n` places of texts, from `start` to `end`."""
        return self._as(self.speculator.between(start, end, n))

    def at_places(self, rows: torch.Tensor, places: torch.Tensor, n: int) -> "CandidateSelection":
        """After `with_context`: what drafts at single places (m,) of rows (m,), among the last `n` of each."""
        return self._as(self.speculator.at_places(rows, places, n))

    def score(self, starts: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of all heads at all places at once, each fed the true tokens: (n_predict, batch, n, vocab).

        Args:
            starts: (batch, n, emb_dim), what drafts start from.
            input_ids: (batch, >= n + n_predict - 1), the token drawn at each place, and those after it.
        """
        cell, n, logits = self.speculator, starts.shape[1], []
        state = cell.first_state(starts)
        for head in range(self.config.n_predict):
            state, head_logits = cell.step(head, state, input_ids[:, head : head + n])
            logits.append(head_logits)
        return torch.stack(logits)

    @torch.no_grad()
    def generate_candidates(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        top_k_tokens_per_head: list[int] | None = None,
        n_candidates: int | None = None,
        vocab_size: int | None = None,
    ) -> torch.Tensor:
        """Drafts by the published rule: `top_k` children per node, the leaves with the highest summed log-prob.

        Args:
            hidden_states: (batch, 1, emb_dim), context vector of each sequence, or what a context layer made of it.
            input_ids: (batch, 1), the token that the base model drew from it.
            top_k_tokens_per_head, n_candidates: default to the config's.
            vocab_size: if given, ids from here on are not drafted.

        Returns:
            (batch, n_candidates, n_predict) token ids, best first; fewer where `config.n_heads` says so.

        Raises:
            ValueError: if the dials don't fit the heads.
        """
        config = self.config
        top_k = config.top_k_tokens_per_head if top_k_tokens_per_head is None else list(top_k_tokens_per_head)
        n_candidates = config.n_candidates if n_candidates is None else n_candidates
        config.check_dials(top_k, n_candidates, n_heads=config.n_heads)
        top_k = top_k[: config.n_heads]

        batch = len(input_ids)
        state = self.speculator.first_state(hidden_states)  # (batch, 1, emb_dim)
        candidates = input_ids[:, :, None]  # (batch, branches, tokens so far)
        log_probs = 0.0
        for head, k in enumerate(top_k):
            state, best, tokens = self.speculator.best_children(head, state, candidates[:, :, -1], k, vocab_size)
            log_probs = (log_probs + best).view(batch, -1, 1)
            candidates = torch.cat([candidates.repeat_interleave(k, dim=1), tokens.view(batch, -1, 1)], dim=-1)
            if head < len(top_k) - 1:
                state = state.repeat_interleave(k, dim=1)
        leaves = log_probs.squeeze(-1).topk(n_candidates).indices  # (batch, n_candidates)
        return candidates[:, :, 1:].gather(1, leaves[:, :, None].expand(-1, -1, len(top_k)))

    @torch.no_grad()
    def generate_tree(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        n_tree_nodes: int | None = None,
        vocab_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Drafts the `n_tree_nodes` most probable nodes of the tree that `top_k_tokens_per_head` spans.

        At equal numbers of nodes they hold more probability than the paths to the most probable leaves, which
        `generate_candidates` drafts. (EAGLE-2, arXiv 2406.16858, section 4, ranks its nodes the same way.)

        Args:
            hidden_states: (batch, 1, emb_dim), context vector of each sequence.
            input_ids: (batch, 1), the token that the base model drew from it.
            n_tree_nodes: defaults to the config's.
            vocab_size: if given, ids from here on are not drafted.

        Returns:
            Tokens, parents and depths, (batch, n_tree_nodes), level by level. Parents are numbered as nodes of the
            tree: 0 is `input_ids`, 1 the first that is returned here.
        """
        n_nodes = self.config.n_tree_nodes if n_tree_nodes is None else n_tree_nodes
        batch = len(input_ids)
        state = self.speculator.first_state(hidden_states)
        token, log_prob = input_ids, hidden_states.new_zeros(batch, 1, dtype=torch.float32)
        levels = []  # of each: tokens, log-probs, parents and depths, (batch, width)
        first, width = 0, 1  # node and width of the level before; the root is node 0
        top_k = self.config.top_k_tokens_per_head[: self.config.n_heads]
        for head, k in enumerate(top_k):
            state, best, tokens = self.speculator.best_children(head, state, token, k, vocab_size)
            # At most 0: rounding must not make a child more probable than its parent, nor must NaN.
            best = torch.where(best <= 0, best, torch.where(best > 0, 0.0, -torch.inf))
            log_prob = (log_prob[:, :, None] + best).flatten(1)  # (batch, width * k)
            # What is not among the best of its level is not among the best of all.
            log_prob, kept = log_prob.topk(min(n_nodes, log_prob.shape[1]))
            parent = kept // k  # within the level before
            token = tokens.flatten(1).gather(1, kept)
            levels.append((token, log_prob, first + parent, torch.full_like(token, head + 1)))
            first, width = first + width, parent.shape[1]
            if head < len(top_k) - 1:
                state = state.gather(1, parent[:, :, None].expand(-1, -1, state.shape[-1]))
        tokens, log_probs, parents, depths = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        # Stable: of equals, the one that comes first is taken, and a parent comes before its children.
        chosen = log_probs.sort(dim=1, descending=True, stable=True).indices[:, :n_nodes].sort(dim=1).values
        number = torch.zeros_like(parents[:, :1]).repeat(1, parents.shape[1] + 1)  # of every node, 0 is the root
        number.scatter_(1, chosen + 1, torch.arange(1, n_nodes + 1, device=chosen.device).expand_as(chosen))
        return tokens.gather(1, chosen), number.gather(1, parents.gather(1, chosen)), depths.gather(1, chosen)


class BoundSelection(CandidateSelection):
    """Heads that draft for one base model."""

    def __init__(self, config: MLPSpeculatorConfig, speculator: Cell):
        self.config, self.speculator = config, speculator
