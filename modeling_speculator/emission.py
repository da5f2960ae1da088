"""What a step emits: the tokens that the base model draws along an accepted path, up to an end."""

import torch
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from .candidate_tree import CandidateTree
from .request import Request
from .rows import Rows
from .sampling import SCORES_ONLY, TokenDraw, draw_row_keys
from .verification import Verified, accept_drawn, cut_at_end
from .walk import Walk, treats_rows_apart


class Emission:
    """Draws at all nodes at once, or, where something reads the text meanwhile, token by token along a walk.

    Attributes:
        walk: None where all nodes are drawn at once.
        drawable: (batch, tokens), whether each emitted token could be sampled; None where that is known.

    Args:
        vocab_size: tokens that are scored.
    """

    def __init__(self, request: Request, rows: Rows, n_predict: int, vocab_size: int):
        batch, device = len(rows.sequences), rows.sequences.device
        processors, criteria = list(request.logits_processor), request.stopping_criteria
        row_keys = draw_row_keys(batch, device) if request.generation_config.do_sample else None
        self.rows, self.drawable = rows, None
        self.draw = TokenDraw(processors, row_keys, vocab_size, n_predict)
        self.eos_token_ids = None if request.eos_token_ids is None else request.eos_token_ids.to(device)
        recorded = {f"record_{what}": request.returns(what) for what in ("scores", "logits")}
        at_once = all(type(processor) in SCORES_ONLY for processor in processors) and all(
            type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in criteria
        )
        streams_rows = request.streamer is not None and batch > 1  # it is given a token of every row at a time
        if at_once and not streams_rows and not any(recorded.values()):
            self.walk = None
        else:
            self.walk = Walk(
                processors,
                criteria,
                self.draw,
                rows.sequences,
                request.input_ids.shape[1],
                # Without a draft no row is ever ahead of the others, and one call serves all.
                together=streams_rows or not rows.drafts or not treats_rows_apart(processors, criteria),
                pad_token_id=request.pad_token_id,
                **recorded,
            )

    def accept(self, logits: torch.Tensor, tree: CandidateTree) -> tuple[Verified, torch.Tensor]:
        """Accepts a path of each row and writes its tokens.

        Args:
            logits: (batch, nodes, vocab).

        Returns:
            What is emitted, and what each row may emit after that: (batch,).
        """
        rows = self.rows
        if self.walk is not None:
            verified, goes_on = self.walk.accept(logits, tree)
            return verified, torch.where(goes_on, rows.budget - verified.n_tokens, 0)
        drawn, drawable = self.draw.at_nodes(logits, tree.depths, tree.max_depth, rows.lengths)
        verified, budget = cut_at_end(accept_drawn(drawn, tree), self.eos_token_ids, rows.budget)
        if not rows.drafts:  # a row that has ended goes on with the others
            tokens = verified.tokens.masked_fill(verified.n_tokens[:, None] == 0, rows.pad_token_id)
            verified = Verified(tokens, verified.nodes, verified.n_tokens)
        rows.write(verified.tokens)
        if drawable is not None:
            along = rows.along[: tree.max_depth + 1]
            self.drawable = drawable.gather(1, verified.nodes) | (along >= verified.n_tokens[:, None])
        return verified, budget
