"""Will speculation help, and with which dials? What a step costs, fitted to a few, times what drafts would yield.

A step is a draft, a verifying forward over the tree's nodes, and the rest. Each is taken to be linear in what it does:
a forward in nodes, a draft in heads and in the states that they score, the rest in nodes. What a draft yields is not
modelled but computed, from texts that the base model has written.
"""

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from types import SimpleNamespace

import torch

from .acceptance import read_context_vectors
from .benchmarking import seconds_in_turn, step_times
from .candidate_tree import CandidateTree
from .configuration_mlp_speculator import DIALS
from .decoding import max_nodes
from .evaluation import accepted_drafts, simulate_emissions


TREE_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CANDIDATES = (1, 2, 3, 4, 5, 8, 16)


@dataclass(frozen=True)
class StepCost:
    """Milliseconds of a step: `per_step`, and for every node, head and scored state."""

    per_step: float
    per_node: float
    per_head: float
    per_state: float

    def of(self, nodes: float, heads: int, states: int) -> float:
        return self.per_step + self.per_node * nodes + self.per_head * heads + self.per_state * states


class Texts:
    """What the base model writes greedily after prompts of one length, and the context vectors of that.

    Args:
        prompts: (n, length), unpadded.
    """

    @torch.no_grad()
    def __init__(self, model, prompts: torch.Tensor, new_tokens: int, batch_size: int = 16):
        self.prompts, self.new_tokens, length = prompts, new_tokens, prompts.shape[1]
        options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        texts, states = [], []
        for some in prompts.split(batch_size):
            texts.append(model.generate(some, attention_mask=torch.ones_like(some), **options))
            states.append(read_context_vectors(model, texts[-1], torch.ones_like(some))[:, length - 1 : -1])
        self.tokens, self.states = torch.cat(texts)[:, length:], torch.cat(states)

    def steps(self, speculator) -> torch.Tensor:
        """The steps that each text would have taken by the speculator's dials: (n,)."""
        tokens = torch.nn.functional.pad(self.tokens, (0, speculator.config.n_predict), value=-100)
        lengths = torch.full_like(tokens[:, 0], self.new_tokens)
        return (simulate_emissions(accepted_drafts(speculator, self.states, tokens), lengths) > 0).sum(-1)

    def nodes(self, speculator, batch_size: int) -> float:
        """The mean size of a step's trees, roots included; rows of a batch are as wide as the widest."""
        config = speculator.config
        if config.n_candidates == 0 or config.n_tree_nodes is not None:
            return float(max_nodes(config))
        roots = self.tokens.reshape(-1, 1)
        states = self.states.flatten(0, 1)[:, None]
        some = torch.arange(0, len(roots), max(1, len(roots) // 512))
        some = some[: max(batch_size, len(some) // batch_size * batch_size)]
        candidates = speculator.generate_candidates(states[some], roots[some])
        sizes = CandidateTree.merge(roots[some], candidates, max_nodes(config)).n_nodes
        return float(torch.stack([part.amax() for part in sizes.split(batch_size)]).float().mean())


def grid(config) -> list[dict]:
    """Dials worth a look: fewer heads, numbers of nodes, numbers of candidates; the first turns speculation off."""
    own = {dial: getattr(config, dial) for dial in DIALS}
    off = own | {"n_candidates": 0, "n_tree_nodes": None, "n_heads": None}
    dials = [off]
    for heads in range(1, config.n_predict + 1):
        top_k = config.top_k_tokens_per_head[:heads]
        leaves = math.prod(top_k)
        n_nodes = sum(math.prod(top_k[: head + 1]) for head in range(heads))
        n_heads = None if heads == config.n_predict else heads
        few = off | {"n_heads": n_heads, "n_candidates": min(leaves, max(1, own["n_candidates"]))}
        dials += [few | {"n_tree_nodes": size} for size in TREE_SIZES if heads <= size <= n_nodes]
        dials += [few | {"n_candidates": k} for k in CANDIDATES if k <= leaves]
    return dials


def work(config) -> tuple[int, int]:
    """Heads that draft, and the states that they score in all."""
    if config.n_candidates == 0:
        return 0, 0
    top_k, width, states = config.top_k_tokens_per_head[: config.n_heads], 1, 0
    for k in top_k:
        states, width = states + width, width * k
        width = width if config.n_tree_nodes is None else min(width, config.n_tree_nodes)
    return len(top_k), states


def measure_steps(model, speculator, texts: Texts, batch_size: int, repeats: int = 3) -> list[dict]:
    """What steps cost with a few dials that span the grid: milliseconds, nodes, heads, states."""
    every = grid(speculator.config)
    trees = [dials for dials in every if dials["n_tree_nodes"] is not None]
    sampled = [every[0], *trees[:: max(1, len(trees) // 6)], trees[-1]]
    sampled += [dials for dials in every[1:] if dials["n_tree_nodes"] is None][:: max(1, len(CANDIDATES) // 2)]
    prompts = texts.prompts[:batch_size]
    options = {"max_new_tokens": texts.new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"attention_mask": torch.ones_like(prompts), "return_dict_in_generate": True}

    def run() -> SimpleNamespace:
        """A step is one of the whole batch, which goes on until its slowest row has ended."""
        rows = model.generate(prompts, assistant_model=speculator, **options).speculation.per_sequence
        return SimpleNamespace(steps=max(row.steps for row in rows))

    rows = []
    with _dials_restored(speculator):
        for dials in sampled:
            _turn(speculator, dials)
            run()
            times = step_times(model, speculator, run, repeats)
            heads, states = work(speculator.config)
            rows.append(
                dials | times | {"nodes": texts.nodes(speculator, batch_size), "heads": heads, "states": states}
            )
    return rows


def fit(rows: list[dict]) -> StepCost:
    """Least squares with no negative cost, of relative errors: a fast step counts as much as a slow one."""
    measured = torch.tensor([row["step_ms"] for row in rows], dtype=torch.double)
    parts = [[1.0, row["nodes"], row["heads"], row["states"]] for row in rows]
    matrix = torch.tensor(parts, dtype=torch.double) / measured[:, None]
    best, least = torch.zeros(4, dtype=torch.double), math.inf
    for size in range(1, 5):  # few enough to try which of them are 0
        for used in map(list, combinations(range(4), size)):
            found = torch.linalg.pinv(matrix[:, used]) @ torch.ones_like(measured)
            error = float((matrix[:, used] @ found - 1).square().sum())
            if (found >= 0).all() and error < least:
                best, least = torch.zeros(4, dtype=torch.double).index_add(0, torch.tensor(used), found), error
    return StepCost(*best.tolist())


def predict(model, speculator, texts: Texts, batch_size: int, cost: StepCost, plain_ms: float) -> list[dict]:
    """Tokens per second and speed-up over plain decoding for all dials of the grid, the fastest first.

    Args:
        plain_ms: what plain `generate` takes for a token of every row.
    """
    rows = []
    with _dials_restored(speculator):
        for dials in grid(speculator.config):
            _turn(speculator, dials)
            steps = texts.steps(speculator)
            # A batch goes on until its slowest row has ended.
            of_batches = torch.stack([part.amax() for part in steps.split(batch_size)])
            step_ms = cost.of(texts.nodes(speculator, batch_size), *work(speculator.config))
            n_tokens = len(steps) * (texts.new_tokens - 1)
            seconds = float(of_batches.sum()) * step_ms / 1000
            rows.append(
                dials
                | {
                    "tokens_per_step": n_tokens / int(steps.sum()),
                    "step_ms": step_ms,
                    "tokens_per_second": n_tokens / seconds,
                    "speedup": len(of_batches) * (texts.new_tokens - 1) * plain_ms / 1000 / seconds,
                    "break_even_tokens_per_step": step_ms / plain_ms,
                }
            )
    return sorted(rows, key=lambda row: -row["tokens_per_second"])


def verify(model, speculator, texts: Texts, batch_size: int, all_dials: list[dict], rounds: int = 3) -> list[dict]:
    """Measured tokens per second of decoding, prefill aside: plain `generate` first, then with each of some dials."""

    def run(dials: dict | None, new_tokens: int) -> None:
        options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        if dials is not None:
            _turn(speculator, dials)
            options["assistant_model"] = speculator
        for some in texts.prompts.split(batch_size):
            model.generate(some, attention_mask=torch.ones_like(some), **options)

    lengths = (1, texts.new_tokens)
    runs = {(at, n): partial(run, dials, n) for at, dials in enumerate([None, *all_dials]) for n in lengths}
    with _dials_restored(speculator):
        for warm_up in runs.values():
            warm_up()
        seconds = seconds_in_turn(runs, rounds)
    n_tokens, rows = len(texts.prompts) * (texts.new_tokens - 1), []
    n_batches = -(-len(texts.prompts) // batch_size)
    for at in range(len(all_dials) + 1):
        decoding = [whole - first for first, whole in zip(*(seconds[at, n] for n in lengths), strict=True)]
        each = statistics.median(decoding)
        rows.append({"tokens_per_second": n_tokens / each, "ms": 1000 * each / n_batches / (texts.new_tokens - 1)})
    return rows


def tune(model, speculator, prompts: torch.Tensor, batch_size: int, new_tokens: int = 64, rounds: int = 3) -> dict:
    """Measures, fits, predicts, and runs what it recommends, to say how wrong the prediction was.

    Args:
        prompts: (n, length), as many as are worth a text each; n at least `batch_size`.

    Returns:
        In JSON's types: the fitted costs, `predictions` of all dials, the fastest first, `recommended` dials, and
        `verified`: predicted and measured tokens per second of those and of the speculator's own dials.
    """
    texts = Texts(model, prompts, new_tokens)
    measured = measure_steps(model, speculator, texts, batch_size, rounds)
    cost = fit(measured)
    (plain,) = verify(model, speculator, texts, batch_size, [], rounds)
    predictions = predict(model, speculator, texts, batch_size, cost, plain["ms"])
    own = {dial: getattr(speculator.config, dial) for dial in DIALS}
    recommended = {dial: predictions[0][dial] for dial in DIALS}
    to_verify = [recommended] + [row for row in map(_dials_of, predictions) if row == own and row != recommended]
    plain, *runs = verify(model, speculator, texts, batch_size, to_verify, rounds)
    verified = []
    for dials, run in zip(to_verify, runs, strict=True):
        predicted = next(row for row in predictions if _dials_of(row) == dials)["tokens_per_second"]
        verified.append(
            dials
            | {
                "predicted_tokens_per_second": predicted,
                "measured_tokens_per_second": run["tokens_per_second"],
                "prediction_error": predicted / run["tokens_per_second"] - 1,
                "measured_speedup": run["tokens_per_second"] / plain["tokens_per_second"],
            }
        )
    return {
        "batch_size": batch_size,
        "context": prompts.shape[1],
        "plain_tokens_per_second": plain["tokens_per_second"],
        "cost_ms": asdict(cost),
        "measured_steps": measured,
        "recommended": recommended,
        "verified": verified,
        "predictions": predictions,
    }


@contextmanager
def _dials_restored(speculator) -> Iterator[None]:
    before = {dial: getattr(speculator.config, dial) for dial in DIALS}
    try:
        yield
    finally:
        _turn(speculator, before)


def _turn(speculator, dials: dict) -> None:
    for dial in DIALS:
        setattr(speculator.config, dial, dials[dial])


def _dials_of(row: dict) -> dict:
    return {dial: row[dial] for dial in DIALS}
