"""Texts that loop, and which drafts a finished text would have accepted."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..context_vectors import read_text
from ..lookup import continuation


def generate_greedily(model, prompt: torch.Tensor, max_new_tokens: int, **kwargs):
    """`model.generate` of one unpadded prompt (1, length), whatever sampling its generation config asks for."""
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, do_sample=False, **kwargs
    )


def distinct_ngrams(tokens: Sequence[int], n: int) -> float:
    """Distinct n-grams over all n-grams: 1 where none repeats; 1 for a text too short to have any."""
    ngrams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def loops(tokens: Sequence[int]) -> bool:
    """Whether half or more of a text's 4-grams are repetitions: easy to guess, which flatters every drafter."""
    return distinct_ngrams(tokens, 4) <= 0.5


@torch.no_grad()
def starts_of_drafts(model, drafter, text: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """What drafts start from along a finished text, by one forward: (batch, length - 1, emb_dim).

    At place t, of the draft after token t + 1: the context vector that it was drawn from, or what a context layer
    makes of that and of those before.

    Args:
        drafter: a speculator, `beside` the base model where it is to draft along this text then.
        text: (batch, length), left-padded.
        attention_mask: (batch, <= length), of its beginning, 0 at padding.
    """
    drafter = drafter.beside(model) if isinstance(drafter, PreTrainedModel) else drafter
    layers = getattr(drafter, "feature_layers", ())
    reading = read_text(model, text[:, :-1], attention_mask[:, : text.shape[1] - 1], layers)
    if not getattr(drafter, "reads_text", False):
        return reading.hidden_states
    segments = torch.nn.functional.pad(attention_mask, (0, text.shape[1] - attention_mask.shape[1]), value=1)
    return drafter.with_context(reading.hidden_states, text[:, 1:], reading.features, segments[:, :-1])


@torch.no_grad()
def accepted_drafts(
    speculator, hidden_states: torch.Tensor, tokens: torch.Tensor, chunk_elements: int = 2**27
) -> torch.Tensor:
    """How many drafted tokens would be accepted at each position of a text that the base model wrote.

    Those of a lookup branch, which no head drafts, are `accepted_lookups`.

    Args:
        speculator: drafts by its dials; what `starts_of_drafts` was given.
        hidden_states: (batch, length, emb_dim), what drafts after the tokens start from (`starts_of_drafts`).
        tokens: (batch, length), from the first one after the prompt on; -100 where nothing can be accepted, as after
            an end of text.
        chunk_elements: logits of the widest level of the trees that are drafted at once.

    Returns:
        (batch, length - n_predict) integers between 0 and `n_predict`.
    """
    config = speculator.config
    n = tokens.shape[1] - config.n_predict
    if config.n_candidates == 0 or config.n_predict == 0:  # no speculation, or no heads
        return torch.zeros_like(tokens[:, :n])
    chunk_size = max(1, chunk_elements // (config.vocab_size * math.prod(config.top_k_tokens_per_head[:-1])))
    chunk_size = min(chunk_size, max(1, chunk_elements // max(1, getattr(speculator, "copied_per_place", 0))))
    roots = tokens[:, :n].clamp(0, config.vocab_size - 1).reshape(-1, 1)  # the base model may have more
    truth = tokens[:, 1:].unfold(1, config.n_predict, 1).flatten(0, 1)  # (batch * n, n_predict)
    states = hidden_states[:, :n].flatten(0, 1)[:, None]
    numbers, parts = torch.arange(len(roots), device=roots.device), []
    for at in range(0, len(roots), chunk_size):
        here = slice(at, at + chunk_size)
        drafter = speculator
        if hasattr(speculator, "at_places"):
            drafter = speculator.at_places(numbers[here] // n, numbers[here] % n, hidden_states.shape[1])
        if config.n_tree_nodes is None:
            candidates = drafter.generate_candidates(states[here], roots[here])
            parts.append((candidates == truth[here, None, : candidates.shape[-1]]).cumprod(-1).sum(-1).amax(-1))
        else:
            drafted, parents, depths = drafter.generate_tree(states[here], roots[here])
            right = drafted == truth[here].gather(1, depths - 1)
            for _ in range(config.n_predict - 1):  # ... and so must be all of its ancestors
                right &= torch.nn.functional.pad(right, (1, 0), value=True).gather(1, parents)
            parts.append((right * depths).amax(-1))
    accepted = torch.cat(parts).view(len(tokens), n)
    if not getattr(speculator, "drafts_after_prompt", True):
        accepted[:, :1] = 0
    return accepted


def accepted_lookups(
    prompts: torch.Tensor, attention_mask: torch.Tensor, tokens: torch.Tensor, n_lookup_tokens: int
) -> torch.Tensor:
    """How many tokens of a lookup branch would be accepted at each position of a text that the base model wrote.

    Where there are heads and a branch, the larger of both numbers is.

    Args:
        prompts, attention_mask: (batch, prompt), what the text begins with; 0 at padding.
        tokens: (batch, length); -100 where nothing can be accepted, as after an end of text.

    Returns:
        (batch, length) integers between 0 and `n_lookup_tokens`.
    """
    text = torch.cat([prompts, tokens.clamp(min=0)], dim=1)
    readable = torch.nn.functional.pad(attention_mask.bool(), (0, tokens.shape[1]), value=True)
    truth = torch.nn.functional.pad(tokens, (0, n_lookup_tokens), value=-100)
    accepted = torch.zeros_like(tokens)
    for at in range(tokens.shape[1]):
        end = prompts.shape[1] + at + 1
        lengths = torch.full_like(tokens[:, :1], end)
        drafted, found = continuation(text[:, :end], readable[:, :end], lengths, n_lookup_tokens)
        right = drafted == truth[:, at + 1 : at + 1 + n_lookup_tokens]
        accepted[:, at] = right.cumprod(-1).sum(-1) * found
    return accepted


def simulate_steps(accepted: torch.Tensor, lengths: torch.Tensor) -> tuple[int, int]:
    """The steps that speculation would have taken over texts, and the tokens that they would have emitted.

    Exact where the base model wrote the texts by the rule (greedy, or sampled) that the speculation would verify by.

    Args:
        accepted: (batch, n), of `accepted_drafts`.
        lengths: (batch,), tokens of each text up to its end; the first one is the prefill's.
    """
    emitted = simulate_emissions(accepted, lengths)
    return int((emitted > 0).sum()), int(emitted.sum())


def simulate_emissions(accepted: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`simulate_steps`, step by step: the tokens that each would have emitted, (batch, n), 0 after the last."""
    rows, n = torch.arange(len(accepted), device=accepted.device), accepted.shape[1]
    at, emissions = torch.zeros_like(lengths), torch.zeros_like(accepted)
    for step in range(n):
        goes_on = at < (lengths - 1).clamp(max=n)
        emitted = torch.minimum(accepted[rows, at.clamp(max=n - 1)] + 1, lengths - 1 - at) * goes_on
        emissions[:, step], at = emitted, at + emitted
    return emissions
