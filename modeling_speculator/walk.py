"""Logits processors and stopping criteria that read the text, walked along the accepted path as in plain decoding.

They are called once per emitted token, in order, with the text up to there, as `generate` calls them; only the logits
come from the verified tree. What is known to treat each row for itself is walked row by row, so that rows may differ
in length. Anything else (a user's own class, classifier-free guidance with its cache) gets the whole batch, as it does
from `generate`: the rows then advance together, by as many tokens as the worst draft of them allows.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers.generation import LogitsProcessor, StoppingCriteriaList
from transformers.generation import logits_process as lp
from transformers.generation import stopping_criteria as sc

from .candidate_tree import CandidateTree
from .sampling import SCORES_ONLY, TokenDraw
from .transformers_api import prefix_allowed_tokens_fn
from .verification import Verified


# Without a state, and what they do to a row depends on that row alone.
_ROW_BY_ROW_PROCESSORS = SCORES_ONLY + (
    lp.ExponentialDecayLengthPenalty,
    lp.ForcedBOSTokenLogitsProcessor,
    lp.ForcedEOSTokenLogitsProcessor,
    lp.MinLengthLogitsProcessor,
    lp.MinNewTokensLengthLogitsProcessor,
    lp.NoBadWordsLogitsProcessor,
    lp.NoRepeatNGramLogitsProcessor,
    lp.PrefixConstrainedLogitsProcessor,
    lp.RepetitionPenaltyLogitsProcessor,
    lp.SequenceBiasLogitsProcessor,
    lp.SuppressTokensAtBeginLogitsProcessor,
)
_ROW_BY_ROW_CRITERIA = (sc.EosTokenCriteria, sc.MaxLengthCriteria, sc.MaxTimeCriteria, sc.StopStringCriteria)


def treats_rows_apart(processors: list[LogitsProcessor], criteria: StoppingCriteriaList) -> bool:
    """Whether rows of a batch may be walked one by one. By exact type: a subclass may do anything."""
    return (
        all(type(processor) in _ROW_BY_ROW_PROCESSORS for processor in processors)
        and all(type(criterion) in _ROW_BY_ROW_CRITERIA for criterion in criteria)
        and (pads_at_end(criteria) or all(type(criterion) is sc.MaxLengthCriteria for criterion in criteria))
    )


def pads_at_end(criteria: StoppingCriteriaList) -> bool:
    """Whether a row that has stopped is padded: `generate` without an end token lets it run on with the others."""
    return any(hasattr(criterion, "eos_token_id") for criterion in criteria)


@dataclass
class Group:
    """Rows that advance together.

    length: columns of their text.
    unfinished: (rows,) bool, what no criterion has stopped.
    scores, logits: (rows, vocab) of each emitted token, if they are to be returned.
    """

    rows: slice
    processors: list[LogitsProcessor]
    length: int
    unfinished: torch.Tensor
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


class Walk:
    """Accepts a path token by token, for requests that `verification.accept_drawn` can't serve.

    Args:
        sequences: (batch, columns), the text; written where a token is emitted.
        prompt_length: columns that are there already.
        together: whether all rows advance together.
        pad_token_id: what a row that has ended is filled with.
        record_scores, record_logits: whether to keep what was drawn from, processed and raw.
    """

    def __init__(
        self,
        processors: list[LogitsProcessor],
        criteria: StoppingCriteriaList,
        draw: TokenDraw,
        sequences: torch.Tensor,
        prompt_length: int,
        together: bool,
        pad_token_id: int,
        record_scores: bool = False,
        record_logits: bool = False,
    ):
        self.criteria, self.draw = criteria, draw
        self.sequences = sequences
        self.pad_token_id, self.pads_at_end = pad_token_id, pads_at_end(criteria)
        self.record_scores, self.record_logits = record_scores, record_logits
        batch = len(sequences)
        slices = [slice(0, batch)] if together else [slice(row, row + 1) for row in range(batch)]
        self.groups = [
            Group(
                rows,
                processors if together else [_for_row(processor, rows.start) for processor in processors],
                prompt_length,
                torch.ones(rows.stop - rows.start, dtype=torch.bool, device=sequences.device),
            )
            for rows in slices
        ]

    def accept(self, logits: torch.Tensor, tree: CandidateTree) -> tuple[Verified, torch.Tensor]:
        """Descends from the root while the token drawn at a node is a child of it, and nothing says stop.

        Args:
            logits: (batch, nodes, vocab).

        Returns:
            What is emitted, and which rows go on (batch,): bool.
        """
        places = len(logits), tree.max_depth + 1
        verified = Verified(
            tokens=self.sequences.new_full(places, self.pad_token_id),
            nodes=self.sequences.new_zeros(places),
            n_tokens=self.sequences.new_zeros(len(logits)),
        )
        for group in self.groups:
            if group.unfinished.any():
                parts = Verified(*(part[group.rows] for part in verified))  # views: written in place
                self._accept(group, logits[group.rows], tree.rows(group.rows), parts)
        return verified, torch.cat([self._goes_on(group) for group in self.groups])

    def _goes_on(self, group: Group) -> torch.Tensor:
        return group.unfinished if self.pads_at_end else group.unfinished.any().expand_as(group.unfinished)

    def _accept(self, group: Group, logits: torch.Tensor, tree: CandidateTree, verified: Verified) -> None:
        text = self.sequences[group.rows]
        node = torch.zeros_like(text[:, 0])
        for depth in range(tree.max_depth + 1):
            emits = self._goes_on(group)
            # In float32, as `generate` does, and a copy: processors may write into it.
            raw = logits[torch.arange(len(node), device=node.device), node].to(torch.float32, copy=True)
            scores = raw.clone() if self.record_logits else raw
            so_far = text[:, : group.length].contiguous()  # what is plain decoding's own tensor
            for processor in group.processors:
                scores = processor(so_far, scores)
            token = self.draw.of_rows(scores, group.rows, group.length)
            token = torch.where(emits, token, self.pad_token_id)
            text[:, group.length] = verified.tokens[:, depth] = token
            verified.nodes[:, depth] = node
            verified.n_tokens.add_(emits)
            group.length += 1
            if self.record_logits:
                group.logits.append(raw)
            if self.record_scores:
                group.scores.append(scores)
            recorded = tuple(group.scores) if self.record_scores else None
            group.unfinished = group.unfinished & ~self.criteria(text[:, : group.length].contiguous(), recorded)
            node, is_child = tree.child(node, token)
            emits = self._goes_on(group)
            if not bool(emits.any() & (is_child | ~emits).all()):
                return

    def recorded(self, what: Callable[[Group], list[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        """The `scores` or `logits` of all groups, (batch, vocab) for each token; 0 where a row has ended before."""
        parts = [torch.stack(what(group)) for group in self.groups]  # (tokens, rows, vocab)
        longest = max(len(part) for part in parts)
        parts = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, longest - len(part))) for part in parts]
        return tuple(torch.cat(parts, dim=1))


def _for_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """A processor of the whole batch as one of a single row, where it knows rows by their index."""
    if type(processor) is lp.RepetitionPenaltyLogitsProcessor:
        if isinstance(processor.prompt_ignore_length, torch.Tensor):
            processor = copy.copy(processor)
            processor.prompt_ignore_length = processor.prompt_ignore_length[row : row + 1]
    elif type(processor) is lp.PrefixConstrainedLogitsProcessor:
        allowed = prefix_allowed_tokens_fn(processor)
        processor = lp.PrefixConstrainedLogitsProcessor(lambda _, input_ids: allowed(row, input_ids), num_beams=1)
    return processor
