"""Will speculation help, and with which dials? What a step costs, fitted to a few, times what drafts would yield.

A step is a draft, a verifying forward over the tree's nodes, and the rest. Each is taken to be linear in what it does:
a forward in nodes, a draft in heads and in the states that they score, the rest in nodes. What a draft yields is not
modelled but computed, from texts that the base model has written.
"""

import math
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations

import torch
from tqdm import tqdm

from ..candidate_tree import CandidateTree, max_nodes
from ..configuration_mlp_speculator import DIALS
from ..drafters import dials_of, turned
from ..lookup import lookup_tokens
from ..vocabularies import beside
from .benchmarking import seconds_in_turn
from .evaluation import accepted_drafts, accepted_lookups, simulate_emissions, starts_of_drafts
from .latency import BETWEEN


TREE_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CANDIDATES = (1, 2, 3, 4, 5, 8, 16)
LOOKUP_TOKENS = (0, 4, 8)
MEASURED_PROMPTS = 4  # of one load, for the costs of a step


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
    """What the base model writes greedily after prompts of one length, and what one speculator drafts there.

    Args:
        prompts: (n, length), unpadded.
    """

    @torch.no_grad()
    def __init__(self, model, prompts: torch.Tensor, new_tokens: int, batch_size: int = 16):
        self.model, self.prompts, self.new_tokens, length = model, prompts, new_tokens, prompts.shape[1]
        options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        texts = []
        for some in tqdm(prompts.split(batch_size), desc="texts", unit="batch", leave=False):
            texts.append(model.generate(some, attention_mask=torch.ones_like(some), **options))
        self.texts, self.batch_size = torch.cat(texts), batch_size
        self.tokens = self.texts[:, length:]
        self._along = None
        self._drafts, self._lookups = {}, {}  # what would be accepted: by the heads' dials, by the tokens of a branch

    def drafting(self, speculator) -> list[tuple]:
        """Of each batch, what drafts along its texts, and what drafts start from: (n, new_tokens, emb_dim)."""
        if self._along is None or self._along[0] is not speculator:
            pairs = []
            for some in self.texts.split(self.batch_size):
                drafter = beside(self.model, speculator)
                starts = starts_of_drafts(self.model, drafter, some, torch.ones_like(some))
                pairs.append((drafter, starts[:, self.prompts.shape[1] - 1 :]))
            self._along = speculator, pairs
        return self._along[1]

    def steps(self, speculator) -> torch.Tensor:
        """The steps that each text would have taken by the speculator's dials: (n,)."""
        config, lengths = speculator.config, torch.full_like(self.tokens[:, 0], self.new_tokens)
        dials = str({dial: getattr(config, dial) for dial in DIALS if dial != "n_lookup_tokens"})
        if dials not in self._drafts:
            tokens = torch.nn.functional.pad(self.tokens, (0, config.n_predict), value=-100).split(self.batch_size)
            pairs = zip(self.drafting(speculator), tokens, strict=True)
            self._drafts[dials] = torch.cat([accepted_drafts(*along, some) for along, some in pairs])
        accepted = self._drafts[dials]
        if n := lookup_tokens(config):
            if n not in self._lookups:
                self._lookups[n] = accepted_lookups(self.prompts, torch.ones_like(self.prompts), self.tokens, n)
            accepted = torch.maximum(accepted, self._lookups[n])
        return (simulate_emissions(accepted, lengths) > 0).sum(-1)

    def nodes(self, speculator, batch_size: int) -> float:
        """The mean size of a step's trees, roots included; rows of a batch are as wide as the widest.

        A lookup branch is taken to be found at every step, and to share no node with the others.
        """
        return self._drafted_nodes(speculator, batch_size) + lookup_tokens(speculator.config)

    def _drafted_nodes(self, speculator, batch_size: int) -> float:
        config = speculator.config
        if config.n_candidates == 0 or config.n_tree_nodes is not None:
            return float(max_nodes(config))
        every, sizes = max(1, self.tokens.numel() // 512), []
        for (drafter, starts), tokens in zip(
            self.drafting(speculator), self.tokens.split(self.batch_size), strict=True
        ):
            for some in torch.arange(0, tokens.numel(), every).split(8):
                rows, places = some // tokens.shape[1], some % tokens.shape[1]
                here = drafter.at_places(rows, places, starts.shape[1]) if hasattr(drafter, "at_places") else drafter
                roots = tokens[rows, places][:, None]
                candidates = here.generate_candidates(starts[rows, places][:, None], roots)
                sizes.append(CandidateTree.merge(roots, candidates, max_nodes(config)).n_nodes)
        return float(torch.stack([part.amax() for part in torch.cat(sizes).split(batch_size)]).float().mean())


def off(config) -> dict:
    """Dials that turn speculation off."""
    none = {"n_candidates": 0, "n_tree_nodes": None, "n_heads": None, "n_lookup_tokens": 0}
    return {dial: getattr(config, dial) for dial in DIALS} | none


def grid(config) -> list[dict]:
    """Dials worth a look: none, its own; fewer heads, numbers of nodes and of candidates, wide trees and narrow; all
    of these with a lookup branch, too."""
    own = {dial: getattr(config, dial) for dial in DIALS}
    dials = [off(config), own]
    for heads in range(1, config.n_predict + 1):
        top_k = config.top_k_tokens_per_head
        leaves = math.prod(top_k[:heads])
        n_nodes = sum(math.prod(top_k[: head + 1]) for head in range(heads))
        few = off(config) | {"n_heads": None if heads == config.n_predict else heads}
        few["n_candidates"] = min(leaves, max(1, own["n_candidates"]))
        dials += [few | {"n_tree_nodes": size} for size in TREE_SIZES if heads <= size <= n_nodes]
        dials += [few | {"n_candidates": k} for k in CANDIDATES if k <= leaves]
        chains = {k: [k] + [1] * (config.n_predict - 1) for k in CANDIDATES if k <= config.vocab_size}
        dials += [few | {"n_candidates": k, "top_k_tokens_per_head": top_k} for k, top_k in chains.items()]
    dials += [some | {"n_lookup_tokens": n} for some in dials[1:] for n in LOOKUP_TOKENS]
    return [some for at, some in enumerate(dials) if some not in dials[:at]]


def work(config) -> tuple[int, int]:
    """Heads that draft, and the states that they score in all."""
    if config.n_candidates == 0:
        return 0, 0
    top_k, width, states = config.top_k_tokens_per_head[: config.n_heads], 1, 0
    for k in top_k:
        states, width = states + width, width * k
        width = width if config.n_tree_nodes is None else min(width, config.n_tree_nodes)
    return len(top_k), states


def decoding_seconds(
    model,
    speculator,
    prompts: torch.Tensor,
    batch_size: int,
    new_tokens: int,
    every: list[dict | None],
    rounds: int,
    desc: str,
) -> list[list[float]]:
    """How long decoding takes after the first token, plainly (None) or with each of some dials, run in turn."""

    def run(dials: dict | None, n: int) -> None:
        options = {"max_new_tokens": n, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        options |= {} if dials is None else {"assistant_model": speculator}
        with turned(speculator, dials or {}):
            for some in prompts.split(batch_size):
                model.generate(some, attention_mask=torch.ones_like(some), **options)

    runs = {(at, n): partial(run, dials, n) for at, dials in enumerate(every) for n in (1, new_tokens)}
    for warm_up in tqdm(runs.values(), desc=f"{desc}, a first round", unit="run", leave=False):
        warm_up()
    seconds = seconds_in_turn(runs, rounds, desc)
    pairs = [(seconds[at, 1], seconds[at, new_tokens]) for at in range(len(every))]
    return [[whole - first for first, whole in zip(*pair, strict=True)] for pair in pairs]


def measure_steps(model, speculator, texts: Texts, batch_size: int, rounds: int = 3) -> tuple[float, list[dict]]:
    """What steps cost with a few dials that span the grid.

    Returns:
        Milliseconds of plain `generate` for a token of every row; of each dial's step, with its nodes, heads, states.
    """
    known = grid(speculator.config)
    trees = [dials for dials in known if dials["n_tree_nodes"] is not None]
    candidates = [dials for dials in known[1:] if dials["n_tree_nodes"] is None]
    spread = [some[at * (len(some) - 1) // 5] for some in (trees, candidates) if some for at in range(6)]
    sampled = [known[0], *spread]
    n_prompts = -(-min(MEASURED_PROMPTS, len(texts.prompts)) // batch_size) * batch_size
    some = texts.prompts[:n_prompts]
    every = [each for at, dials in enumerate(sampled) for each in ([] if at % BETWEEN else [None]) + [dials]] + [None]
    seconds = decoding_seconds(
        model, speculator, some, batch_size, texts.new_tokens, every, rounds, desc="costs of a step"
    )
    plain = [at for at, dials in enumerate(every) if dials is None]
    usual = statistics.median(second for at in plain for second in seconds[at])
    rows = []
    for at, dials in enumerate(every):
        if dials is None:
            continue
        before, after = max(one for one in plain if one < at), min(one for one in plain if one > at)
        share = (at - before) / (after - before)
        rounds_of_it = zip(seconds[at], seconds[before], seconds[after], strict=True)
        relative = statistics.median(own / ((1 - share) * one + share * other) for own, one, other in rounds_of_it)
        with turned(speculator, dials):
            heads, states = work(speculator.config)
            # A batch goes on until its slowest row has ended.
            n_steps = sum(int(part.amax()) for part in texts.steps(speculator)[:n_prompts].split(batch_size))
            nodes = texts.nodes(speculator, batch_size)
        cost = {"step_ms": 1000 * usual * relative / n_steps, "nodes": nodes, "heads": heads, "states": states}
        rows.append(dials | cost)
    return 1000 * usual / (texts.new_tokens - 1) / (n_prompts // batch_size), rows


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


def predict(speculator, texts: Texts, batch_size: int, cost: StepCost, plain_ms: float) -> list[dict]:
    """Tokens per second and speed-up over plain decoding for all dials of the grid, the fastest first.

    Args:
        plain_ms: what plain `generate` takes for a token of every row.
    """
    rows = []
    for dials in tqdm(grid(speculator.config), desc="predictions", unit="dials", leave=False):
        with turned(speculator, dials):
            steps = texts.steps(speculator)
            step_ms = cost.of(texts.nodes(speculator, batch_size), *work(speculator.config))
        of_batches = torch.stack([part.amax() for part in steps.split(batch_size)])
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


def tune(model, speculator, prompts: torch.Tensor, batch_size: int, new_tokens: int = 64, rounds: int = 3) -> dict:
    """Measures, fits, predicts, and runs what it recommends, to say how wrong the prediction was.

    Args:
        prompts: (n, length), n a multiple of `batch_size`.

    Returns:
        In JSON's types: the fitted costs, `predictions` of all dials, the fastest first; `verified`, predicted and
        measured tokens per second of the first of them and of the speculator's own dials; and `recommended`, the
        fastest of what was measured, which may be to leave speculation off.
    """
    texts = Texts(model, prompts, new_tokens)
    plain_ms, measured = measure_steps(model, speculator, texts, batch_size, rounds)
    cost = fit(measured)
    predictions = predict(speculator, texts, batch_size, cost, plain_ms)
    by_dials = {str(_dials_in(row)): row for row in predictions}
    to_verify = {str(dials): dials for dials in (_dials_in(predictions[0]), dials_of(speculator))}
    every = [None, *to_verify.values()]
    plain, *seconds = decoding_seconds(
        model, speculator, prompts, batch_size, new_tokens, every, rounds, desc="the fastest, measured"
    )
    n_tokens = len(prompts) * (new_tokens - 1)
    plain_rate = n_tokens / statistics.median(plain)
    verified = []
    for (key, dials), each in zip(to_verify.items(), seconds, strict=True):
        predicted, rate = by_dials[key]["tokens_per_second"], n_tokens / statistics.median(each)
        speedup = statistics.median(one / own for one, own in zip(plain, each, strict=True))
        verified.append(
            dials
            | {
                "predicted_tokens_per_second": predicted,
                "measured_tokens_per_second": rate,
                "prediction_error": predicted / rate - 1,
                "measured_speedup": speedup,
                "speedup_error": by_dials[key]["speedup"] / speedup - 1,  # free of how fast the machine was meanwhile
            }
        )
    fastest = max(verified, key=lambda row: row["measured_speedup"])
    return {
        "batch_size": batch_size,
        "context": prompts.shape[1],
        "plain_tokens_per_second": plain_rate,
        "cost_ms": asdict(cost),
        "measured_steps": measured,
        "predictions": predictions,
        "verified": verified,
        "recommended": _dials_in(fastest) if fastest["measured_speedup"] > 1 else off(speculator.config),
    }


def _dials_in(row: dict) -> dict:
    return {dial: row[dial] for dial in DIALS}
