"""A picture of speculation: one self-contained HTML page that shows a text by its steps, and every draft of each."""

import datetime
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from transformers import PreTrainedTokenizerBase

from ..statistics import SpeculationStatistics
from ..tracing import TracedStep


TEMPLATE = Path(__file__).with_name("trace_page.html")
_VISIBLE = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}


@dataclass(frozen=True)
class TracedText:
    """One prompt and what was generated after it.

    prompt, continuation: token ids, without padding.
    speculation: of this row, with its `trace`.
    """

    prompt: list[int]
    continuation: list[int]
    speculation: SpeculationStatistics


def traced_texts(out, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[TracedText]:
    """Each row of a batch, without padding."""
    texts = []
    for row, speculation in enumerate(out.speculation.per_sequence):
        end = input_ids.shape[1] + 1 + speculation.tokens
        prompt, continuation = input_ids[row][attention_mask[row] == 1], out.sequences[row, input_ids.shape[1] : end]
        texts.append(TracedText(prompt.tolist(), continuation.tolist(), speculation))
    return texts


def render(texts: list[TracedText], tokenizer: PreTrainedTokenizerBase, facts: dict[str, str]) -> str:
    """The page.

    Args:
        facts: what stands in its head, such as {"base model": ..., "speculator": ..., "machine": ...}.

    Raises:
        ValueError: if a text has no trace.
    """
    if any(text.speculation.trace is None for text in texts):
        raise ValueError("A text has no trace: generate it with `trace_speculation=True` in the generation config.")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        facts=facts | {"date": datetime.date.today().isoformat()},
        texts=[_text(text, tokenizer) for text in texts],
        summary=_summary(SpeculationStatistics.pool(text.speculation for text in texts)),
    )


def _summary(statistics: SpeculationStatistics) -> dict:
    """The figures of all texts, and at which position drafts fail."""
    reached, positions = 1.0, []
    for position, share in enumerate(statistics.accepted_per_position, start=1):
        positions.append({"number": position, "accepted": share, "failed": reached - share})
        reached = share
    return {
        "tokens_per_step": statistics.tokens_per_step,
        "steps": statistics.steps,
        "tokens": statistics.tokens,
        "drafted": statistics.drafted_tokens,
        "positions": positions,
    }


def _text(text: TracedText, tokenizer: PreTrainedTokenizerBase) -> dict:
    pieces = iter(_pieces(text.prompt, text.continuation, tokenizer))
    first = next(pieces, "")  # of the prefill
    steps = []
    for number, step in enumerate(text.speculation.trace, start=1):
        emitted = [{"text": next(pieces), "drafted": _drafted(step, at)} for at in range(len(step.emitted))]
        steps.append({"number": number, "emitted": emitted, "branches": _branches(step, tokenizer)})
    return {
        "prompt": tokenizer.decode(text.prompt, skip_special_tokens=False),
        "first": first,
        "steps": steps,
        "tokens_per_step": text.speculation.tokens_per_step,
    }


def _pieces(prompt: list[int], continuation: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the text; of a character that several tokens make, the last of them adds it all."""
    context = prompt[-8:]  # spaces at a word's beginning depend on what is before
    shown, pieces = tokenizer.decode(context), []
    for at in range(1, len(continuation) + 1):
        text = tokenizer.decode(context + continuation[:at])
        is_whole = not text.endswith("\ufffd") or at == len(continuation)
        pieces.append(text[len(shown) :] if is_whole else "")
        shown = text if is_whole else shown
    return pieces


def _drafted(step: TracedStep, at: int) -> dict | None:
    """What was thought of an emitted token where it was drafted; None for the base model's own."""
    return _node(step, step.accepted[at]) if at < len(step.accepted) else None


def _node(step: TracedStep, node: int) -> dict:
    return {
        "position": step.depths[node],
        "probability": step.probabilities[node],
        "rank": step.ranks[node],
        "accepted": node in step.accepted,
    }


def _branches(step: TracedStep, tokenizer: PreTrainedTokenizerBase) -> list[list[dict]]:
    """The candidate tree as lines, one for each leaf: what a line shares with the one above is left empty there."""
    nodes = range(1, len(step.tokens))
    parents = {step.parents[node] for node in nodes}
    paths = []
    for leaf in (node for node in nodes if node not in parents):
        path = [leaf]
        while step.parents[path[0]]:
            path.insert(0, step.parents[path[0]])
        paths.append(path)
    lines, shown = [], set()
    for path in sorted(paths, key=lambda path: [step.ranks[node] for node in path]):
        lines.append(
            [
                None if node in shown else {"text": _visible(step.tokens[node], tokenizer)} | _node(step, node)
                for node in path
            ]
        )
        shown |= set(path)
    return lines


def _visible(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token alone, with its spaces and line ends to be seen."""
    text = tokenizer.decode([token])
    return "".join(_VISIBLE.get(character, character) for character in text) or tokenizer.convert_ids_to_tokens(token)
