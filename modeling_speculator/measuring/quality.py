"""Whether a base model's output stays what it is: the same tokens if greedy, the same distribution if sampled."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..statistics import SpeculationStatistics
from .evaluation import distinct_ngrams
from .prompts import Prompt


FLIPS = 10_000


@dataclass(frozen=True)
class GreedyOutcome:
    """A prompt that was continued greedily, plainly and with a speculator.

    continuation: token ids that the loop emitted with the speculator.
    speculation: what the speculator achieved.
    identical: whether plain `generate` emits the same; if not ...
    position: ... of the first other token, and ...
    gap: ... the difference in logits there between the base model's first two choices: about 0 where rounding decides.
    """

    continuation: list[int]
    speculation: SpeculationStatistics
    identical: bool
    position: int | None = None
    gap: float | None = None

    @property
    def tokens_per_step(self) -> float:
        """1 without a step: the prefill emitted all."""
        return self.speculation.tokens_per_step or 1.0

    @property
    def distinct_4grams(self) -> float:
        """Of the continuation; a text that loops has few, and flatters every drafter."""
        return distinct_ngrams(self.continuation, 4)


@torch.no_grad()
def compare_greedy(
    model, speculator, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options
) -> list[GreedyOutcome]:
    """Continues a batch of left-padded prompts (batch, length) greedily, plainly and with a speculator.

    Args:
        options: of `generate`.
    """
    length = input_ids.shape[1]
    options |= {"attention_mask": attention_mask, "do_sample": False}
    plain = model.generate(input_ids, **options)
    out = model.generate(input_ids, assistant_model=speculator, return_dict_in_generate=True, **options)
    ours = out.sequences
    longest = max(plain.shape[1], ours.shape[1])
    plain, ours = (torch.nn.functional.pad(text, (0, longest - text.shape[1]), value=-1) for text in (plain, ours))
    differ = plain != ours
    outcomes = []
    for row, first in enumerate(differ.long().argmax(-1).tolist()):
        speculation = out.speculation.per_sequence[row]
        end = length + 1 + speculation.tokens  # the prefill emits one
        found = {"identical": not bool(differ[row].any())}
        if not found["identical"]:
            text = plain[row : row + 1, :first]
            mask = torch.nn.functional.pad(attention_mask[row : row + 1], (0, first - length), value=1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            outputs = model(input_ids=text, attention_mask=mask, position_ids=positions)
            best = outputs.logits[0, -1].float().topk(2).values
            found |= {"position": first - length, "gap": float(best[0] - best[1])}
        outcomes.append(GreedyOutcome(ours[row, length:end].tolist(), speculation, **found))
    return outcomes


@torch.no_grad()
def sample(
    model,
    speculator,
    tokenizer,
    prompts: list[Prompt],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    **options,
) -> list[dict]:
    """Samples a text for each prompt, with a speculator or, where it is None, plainly.

    Returns:
        Of each row what a change of the distribution would move: tokens until the end (`length`), mean
        `log_likelihood` of a token under the base model, distinct 4-grams, and, where a prompt has a reference that
        ends with a number, whether the text's last number is that (`score`).
    """
    length = input_ids.shape[1]
    assistant = {} if speculator is None else {"assistant_model": speculator}
    text = model.generate(input_ids, attention_mask=attention_mask, do_sample=True, **assistant, **options)
    tokens = text[:, length:]
    eos = options.get("eos_token_id", model.generation_config.eos_token_id)
    eos = torch.tensor([] if eos is None else eos, dtype=torch.long, device=tokens.device).flatten()
    ends = torch.isin(tokens, eos)
    counts = ends.cumsum(-1) - ends.long() == 0  # up to the first end, which counts, too
    mask = torch.nn.functional.pad(attention_mask, (0, tokens.shape[1]), value=1)
    rows = []
    for row in range(len(text)):  # the logits of one text at a time
        positions = (mask[row : row + 1].cumsum(-1) - 1).clamp(min=0)
        logits = model(
            input_ids=text[row : row + 1], attention_mask=mask[row : row + 1], position_ids=positions
        ).logits
        log_probs = logits[0, length - 1 : -1].float().log_softmax(-1).gather(-1, tokens[row][:, None])[:, 0]
        written = tokens[row][counts[row]].tolist()
        found = {
            "length": float(len(written)),
            "log_likelihood": float(log_probs[counts[row]].mean()),
            "distinct_4grams": distinct_ngrams(written, 4),
        }
        expected = last_number(prompts[row].reference or "")
        if expected is not None:
            said = last_number(tokenizer.decode(written, skip_special_tokens=True))
            found["score"] = float(said == expected)
        rows.append(found)
    return rows


def compare_samples(plain: Sequence[dict], ours: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Means of what `sample` returns for the same prompts in the same order, plainly and with a speculator.

    Returns:
        Of each figure the two means, and the p-value of their difference: the share of 10,000 random swaps within the
        pairs that make the means differ as much. Few of many p-values are below 0.05 by chance.
    """
    report = {}
    for name in sorted(set.intersection(*(set(row) for row in [*plain, *ours]))):
        one, other = (torch.tensor([row[name] for row in rows], dtype=torch.double) for rows in (plain, ours))
        difference = other - one
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (FLIPS, len(difference)), generator=generator) * 2 - 1
        swapped = (signs * difference).mean(-1).abs()
        as_far = int((swapped >= difference.mean().abs() - 1e-12).sum())
        p_value = (as_far + 1) / (FLIPS + 1)  # the pairs as they are count, too
        report[name] = {"plain": float(one.mean()), "speculative": float(other.mean()), "p_value": p_value}
    return report


def last_number(text: str) -> float | None:
    """The last number of a text, as GSM8K's answers end with it ("#### 1,234")."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None
