"""A base model's own forward over a tree, beside plain decoding: what proves that the loop may serve its type."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from transformers import DynamicCache, PreTrainedModel

from .attention import tree_attention
from .cache import SpeculativeCache
from .candidate_tree import CandidateTree
from .families import FAMILIES, Family, attention_windows
from .transformers_api import CACHE, cache_of


# Of the largest logit: where plain decoding prefers its own token by less than that, rounding may decide. Coarse
# rounding is torchao's int8 with a scale a token: stories260K, with logits up to 16, parted at margins of up to 0.23.
ROUNDING = 0.02
# Of the largest logit: by how much a logit may differ, where nothing else than rounding does. bf16 keeps 8 bits.
SAME = 0.05
_WINDOW, _PROMPT = 8, 24  # tokens: a prompt is to be longer than a window


@dataclass(frozen=True)
class TreeReport:
    """How a tree's logits differ from those that plain decoding has for each path.

    difference, largest: the largest difference of a logit, and the largest logit.
    nodes, other_choices: how many were compared, and at how many another token is the most probable.
    margin: by how much plain decoding prefers its own there, at most.
    """

    difference: float
    largest: float
    nodes: int
    other_choices: int
    margin: float


@dataclass(frozen=True)
class Trial:
    """One way to give a decoder its masks.

    masks: of `Family`.
    is_right: whether a tree's logits are those of plain decoding.
    said: by what they differ, or why it could not be tried.
    """

    masks: str
    is_right: bool
    said: str


def trials(model: PreTrainedModel) -> Iterator[Trial]:
    """The masks that a decoder of an unknown type may expect, tried one after the other.

    A window is made shorter than the text meanwhile: what is longer would hide nothing.
    """
    config = model.config.get_text_config(decoder=True)
    device = model.get_input_embeddings().weight.device
    prompt = torch.randint(config.vocab_size, (1, _PROMPT), generator=torch.Generator().manual_seed(1)).to(device)
    has_window = getattr(config, "sliding_window", None) is not None
    plausible = {"layer types": bool(getattr(config, "layer_types", None)), "window": has_window, "one": True}
    for masks in (masks for masks, is_so in plausible.items() if is_so):
        with patch.dict(FAMILIES, {config.model_type: Family("", masks)}), _narrowed(config):
            try:
                report = compare_tree(model, prompt)
            except Exception as error:  # of any code of somebody's own
                yield Trial(masks, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
                continue
        is_right = report.difference <= SAME * report.largest and report.margin <= ROUNDING * report.largest
        yield Trial(masks, is_right, f"logits differ by up to {report.difference:.1e}, of up to {report.largest:.1f}")


@contextmanager
def _narrowed(config) -> Iterator[None]:
    """All that a config calls a window is short meanwhile."""
    windows = {name: value for name, value in config.to_dict().items() if "window" in name and type(value) is int}
    windows = {name: value for name, value in windows.items() if value > _WINDOW}
    try:
        for name in windows:
            setattr(config, name, _WINDOW)
        yield
    finally:
        for name, value in windows.items():
            setattr(config, name, value)


@torch.no_grad()
def compare_tree(model: PreTrainedModel, prompt: torch.Tensor, n_candidates: int = 5, depth: int = 3) -> TreeReport:
    """Verifies a random tree after a prompt (1, length), and decodes each of its paths plainly."""
    config, length, device = model.config.get_text_config(decoder=True), prompt.shape[1], prompt.device
    generator = torch.Generator().manual_seed(0)
    root = torch.randint(config.vocab_size, (1, 1), generator=generator).to(device)
    candidates = torch.randint(config.vocab_size, (1, n_candidates, depth), generator=generator)
    candidates[0, :, 0] = torch.randperm(config.vocab_size, generator=generator)[:n_candidates]  # none share a prefix
    candidates = candidates.to(device)
    max_nodes = 1 + n_candidates * depth
    tree = CandidateTree.merge(root, candidates, max_nodes)

    past = SpeculativeCache(config.num_hidden_layers, length + max_nodes, attention_windows(config))
    model(input_ids=prompt, use_cache=True, **{CACHE: past})
    past.start_steps(torch.ones_like(prompt), max_nodes)
    with tree_attention(model):
        mask = past.prepare_step(tree, torch.full((1, 1), length, device=device), length + max_nodes)
        positions = length + tree.depths
        logits = model(input_ids=tree.input_ids, attention_mask=mask, position_ids=positions, **{CACHE: past}).logits[
            0
        ]

    differences, sizes, margins, nodes = [], [], [], 0
    for number, candidate in enumerate(candidates[0]):
        # Nodes are numbered level by level.
        path = [0, *(1 + number + level * n_candidates for level in range(depth))]
        plain = decode_path(model, prompt, torch.cat([root[0], candidate]))
        drafted = logits[path].float()
        choice, best = drafted.argmax(-1), plain.max(-1)
        differences.append((drafted - plain).abs().max())
        sizes.append(plain.abs().max())
        margins.append(best.values - plain.gather(1, choice[:, None])[:, 0])
        nodes += len(path)
    margins = torch.cat(margins)
    return TreeReport(
        float(max(differences)), float(max(sizes)), nodes, int((margins > 0).sum()), float(margins.max())
    )


def decode_path(model: PreTrainedModel, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The logits after each of some tokens (n,), run one by one as `generate` does: (n, vocab), float32."""
    past = DynamicCache(config=model.config.get_text_config(decoder=True))
    past = cache_of(model(input_ids=prompt, use_cache=True, **{CACHE: past}))
    logits = []
    for token in tokens:
        outputs = model(input_ids=token.view(1, 1), use_cache=True, **{CACHE: past})
        past = cache_of(outputs)
        logits.append(outputs.logits[0, -1].float())
    return torch.stack(logits)


__all__ = ["ROUNDING", "TreeReport", "Trial", "compare_tree", "trials"]
