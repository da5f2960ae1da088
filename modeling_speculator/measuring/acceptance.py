"""Acceptance on prompts: what real generation accepts, beside what simulation and the heads' accuracy promise."""

from dataclasses import asdict, dataclass

import torch
from torch.nn import functional as F
from tqdm import tqdm

from ..checks import main_device
from ..lookup import lookup_tokens
from ..statistics import SpeculationStatistics
from ..vocabularies import beside
from .evaluation import accepted_drafts, accepted_lookups, loops, simulate_emissions, starts_of_drafts
from .prompts import Prompt, encode, pad_left, too_long
from .records import RecordFile


RESAMPLINGS = 2000


@dataclass(frozen=True)
class PromptAcceptance:
    """One continuation with a speculator.

    continuation: token ids.
    emitted_per_step, drafted_tokens: what `generate` did; see `SpeculationStatistics`.
    simulated_per_step: what `accepted_drafts` expects of the same text, from one forward over all of it.
    correct, correct_top_k, counted: of each head, fed the true tokens: positions where the true token is its first
        choice, or one of those that it drafts, and all positions with a true token.
    """

    continuation: list[int]
    emitted_per_step: list[int]
    drafted_tokens: int
    simulated_per_step: list[int]
    correct: list[int]
    correct_top_k: list[int]
    counted: list[int]


def measure_prompts(
    model,
    speculator,
    tokenizer,
    prompts: list[Prompt],
    file: RecordFile,
    batch_size: int = 16,
    chat: bool = False,
    seed: int = 0,
    **options,
) -> None:
    """Adds a record for every turn of every prompt to a file, but for those that it holds.

    Turn after turn, since a turn is asked after the answers to those before; in batches of similar lengths. A later
    turn that no longer fits into the context is left out, and said to be.

    Args:
        options: of `generate`, `max_new_tokens` among them.

    Raises:
        ValueError: for a prompt whose first turn is too long.
    """
    name = "sampled" if options.get("do_sample") else "greedy"
    with tqdm(desc=name, total=sum(len(prompt.turns) for prompt in prompts), unit="turn") as progress:
        for turn in range(max(len(prompt.turns) for prompt in prompts)):
            rows = _rows_of(turn, prompts, file, tokenizer, chat)
            done = {record["prompt"] for record in file.records if record["turn"] == turn}
            for number, row in list(rows.items()):
                problem = too_long(prompts[number], row, model, options["max_new_tokens"])
                if problem and turn == 0:
                    raise ValueError(problem)
                if problem:
                    progress.write(f"Turn {turn + 1} left out. {problem}")
                    del rows[number]
            longest_first = sorted(rows, key=lambda number: -len(rows[number]))
            for first in range(0, len(longest_first), batch_size):
                numbers = longest_first[first : first + batch_size]
                if not done.issuperset(numbers):
                    torch.manual_seed(seed + 10_000 * turn + first)  # the same after an interruption
                    batch = (part.to(main_device(model)) for part in pad_left([rows[number] for number in numbers]))
                    measured = measure_acceptance(model, speculator, *batch, pad_token_id=0, **options)
                    records = [
                        {"prompt": number, "turn": turn, "category": prompts[number].category} | asdict(found)
                        for number, found in zip(numbers, measured, strict=True)
                    ]
                    file.add([record for record in records if record["prompt"] not in done])
                progress.update(len(numbers))


def _rows_of(turn: int, prompts: list[Prompt], file: RecordFile, tokenizer, chat: bool) -> dict[int, list[int]]:
    """Token ids up to a turn, by number of the prompt; of those that have one and were answered so far."""
    answers = {(record["prompt"], record["turn"]): record["continuation"] for record in file.records}
    asked = [number for number, prompt in enumerate(prompts) if len(prompt.turns) > turn]
    asked = [number for number in asked if all((number, past) in answers for past in range(turn))]
    past = [[tokenizer.decode(answers[n, past], skip_special_tokens=True) for past in range(turn)] for n in asked]
    return dict(zip(asked, encode([prompts[number] for number in asked], past, tokenizer, chat), strict=True))


@torch.no_grad()
def measure_acceptance(
    model, speculator, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options
) -> list[PromptAcceptance]:
    """Continues a batch of left-padded prompts (batch, length) with a speculator, one record a row.

    Args:
        options: of `generate`.
    """
    n_predict, length = speculator.config.n_predict, input_ids.shape[1]
    out = model.generate(
        input_ids,
        attention_mask=attention_mask,
        assistant_model=speculator,
        return_dict_in_generate=True,
        **options,
    )
    rows = out.speculation.per_sequence
    lengths = torch.tensor([1 + row.tokens for row in rows], device=input_ids.device)
    texts = out.sequences[:, length:]
    beyond = torch.arange(texts.shape[1], device=input_ids.device) >= lengths[:, None]
    # What a head would guess past the end counts as wrong, and is not counted.
    tokens = F.pad(texts.masked_fill(beyond, -100), (0, n_predict), value=-100)
    drafter = beside(model, speculator)
    states = starts_of_drafts(model, drafter, out.sequences, attention_mask)[:, length - 1 :]
    accepted = accepted_drafts(drafter, states, tokens)
    if n_lookup_tokens := lookup_tokens(speculator.config):
        looked_up = accepted_lookups(input_ids, attention_mask, tokens[:, : accepted.shape[1]], n_lookup_tokens)
        accepted = torch.maximum(accepted, looked_up)
    simulated = simulate_emissions(accepted, lengths)
    correct, correct_top_k, counted = head_accuracy(drafter, states, tokens)
    return [
        PromptAcceptance(
            continuation=texts[row, : lengths[row]].tolist(),
            emitted_per_step=list(statistics.emitted_per_step),
            drafted_tokens=statistics.drafted_tokens,
            simulated_per_step=[emitted for emitted in simulated[row].tolist() if emitted],
            correct=correct[row].tolist(),
            correct_top_k=correct_top_k[row].tolist(),
            counted=counted[row].tolist(),
        )
        for row, statistics in enumerate(rows)
    ]


def head_accuracy(
    speculator, hidden_states: torch.Tensor, tokens: torch.Tensor, chunk_elements: int = 2**27
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How often each head is right, fed the true tokens.

    Args:
        hidden_states: (batch, n, emb_dim), what drafts after the first n tokens start from.
        tokens: (batch, n + n_predict), -100 where there is none.
        chunk_elements: logits at a time.

    Returns:
        Positions where the true token is a head's first choice, where it is one of those that the head drafts, and
        where there is one: (batch, n_predict) each.
    """
    config, (batch, n) = speculator.config, hidden_states.shape[:2]
    totals = torch.zeros(3, config.n_predict, batch, dtype=torch.long, device=tokens.device)
    if config.n_predict == 0:  # prompt lookup
        return tuple(totals.transpose(1, 2))
    width = max(1, chunk_elements // (config.n_predict * batch * config.vocab_size))
    for at in range(0, n, width):
        end = min(at + width, n)
        read = tokens[:, at : end + config.n_predict - 1].clamp(0, config.vocab_size - 1)
        states = hidden_states[:, at:end]
        if hasattr(speculator, "between"):
            logits = speculator.between(at, end, n).score(states, read)  # (n_predict, batch, end - at, vocab)
        else:
            logits = speculator(states, read).logits
        truth = tokens[:, at + 1 : end + config.n_predict].unfold(1, end - at, 1).transpose(0, 1)
        for head, k in enumerate(config.top_k_tokens_per_head):
            right = logits[head].topk(k).indices == truth[head][..., None]  # of equals, those that are drafted
            totals[:, head] += torch.stack([right[..., 0], right.any(-1), truth[head] != -100]).sum(-1)
    return tuple(totals.transpose(1, 2))


def summarize(records: list[dict], n_predict: int) -> dict:
    """Figures over continuations.

    Args:
        records: of `measure_prompts`: each a `PromptAcceptance` with its `prompt`'s number, `turn` and `category`.

    Returns:
        tokens_per_step with its 95 % interval over prompts, accepted_per_position, and beside them what the heads'
        accuracy and simulation say; without continuations that loop; where simulation and generation part.
    """
    whole = _pool(records, n_predict)
    varied = [record for record in records if not loops(record["continuation"])]
    simulated = [emitted for record in records for emitted in record["simulated_per_step"]]
    counted = [max(1, sum(column)) for column in zip(*(record["counted"] for record in records), strict=True)]

    def share(name: str) -> list[float]:
        columns = zip(*(record[name] for record in records), strict=True)
        return [sum(column) / total for column, total in zip(columns, counted, strict=True)]

    return {
        "prompts": len({record["prompt"] for record in records}),
        "new_tokens": sum(len(record["continuation"]) for record in records),
        "steps": whole.steps,
        "tokens_per_step": whole.tokens_per_step,
        "tokens_per_step_interval": bootstrap_interval(records),
        "tokens_per_step_without_loops": _pool(varied, n_predict).tokens_per_step if varied else None,
        "texts": len(records),
        "looping": len(records) - len(varied),
        "accepted_per_position": whole.accepted_per_position,
        "drafted_tokens": whole.drafted_tokens,
        "teacher_forced_accuracy": share("correct"),
        "teacher_forced_top_k_accuracy": share("correct_top_k"),
        "simulated_tokens_per_step": sum(simulated) / len(simulated) if simulated else None,
        "partings": [parting for record in records if (parting := _parting(record))],
    }


def summarize_categories(records: list[dict], n_predict: int) -> dict:
    """`summarize`, and where there are several categories, `categories`: the same of each."""
    by_category = {}
    for record in records:
        by_category.setdefault(record["category"], []).append(record)
    figures = summarize(records, n_predict)
    if len(by_category) > 1:
        figures["categories"] = {name: summarize(rows, n_predict) for name, rows in by_category.items()}
    return figures


def bootstrap_interval(records: list[dict], level: float = 0.95, seed: int = 0) -> list[float] | None:
    """Of tokens per step, by drawing prompts with replacement (percentiles of 2,000 draws).

    Turns of one prompt are drawn together. None of fewer than two prompts, or where no step was made.
    """
    by_prompt = {}
    for record in records:
        emitted = by_prompt.setdefault(record["prompt"], [])
        emitted += record["emitted_per_step"]
    tokens = torch.tensor([sum(emitted) for emitted in by_prompt.values()], dtype=torch.double)
    steps = torch.tensor([len(emitted) for emitted in by_prompt.values()], dtype=torch.double)
    if len(steps) < 2 or not steps.any():
        return None
    generator = torch.Generator().manual_seed(seed)
    ratios = []
    for _ in range(RESAMPLINGS):
        drawn = torch.randint(len(tokens), (len(tokens),), generator=generator)
        ratios.append(tokens[drawn].sum() / steps[drawn].sum())
    ratios = torch.stack(ratios)
    ratios = ratios[ratios.isfinite()]
    return torch.quantile(ratios, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.double)).tolist()


def _pool(records: list[dict], n_predict: int) -> SpeculationStatistics:
    return SpeculationStatistics.pool(
        SpeculationStatistics(tuple(record["emitted_per_step"]), (), record["drafted_tokens"], n_predict)
        for record in records
    )


def _parting(record: dict) -> dict | None:
    """The first step at which generation accepted another number of tokens than simulation says; None where none."""
    real, simulated = record["emitted_per_step"], record["simulated_per_step"]
    if real == simulated:
        return None
    pairs = zip(real, simulated, strict=False)
    step = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(real), len(simulated)))
    return {"prompt": record["prompt"], "turn": record["turn"], "step": step}
