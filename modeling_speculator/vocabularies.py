"""A speculator beside a base model that has a few ids more or less: tokens that were added, or padding, at the end.

What both have is read and drafted. No output depends on it: an id that is never drafted is never accepted.
"""

import torch

from .candidates import CandidateSelection


# More than tokens added for a chat, or padding to a multiple of 64 or 256, come to: it is another tokenizer then.
MOST_DIFFERENT_IDS = 1024


class SpeculatorOfCommonIds:
    """A speculator as a base model with another number of ids sees it.

    Args:
        vocab_size: of the base model.
    """

    def __init__(self, speculator, vocab_size: int):
        self.speculator, self.config, self.vocab_size = speculator, speculator.config, vocab_size
        lacks_some = vocab_size < self.config.vocab_size
        # A drafter of one's own has no such dial: what it drafts beyond is replaced.
        chooses = lacks_some and isinstance(speculator, CandidateSelection)
        self.dials = {"vocab_size": vocab_size} if chooses else {}

    def at_places(self, *places) -> "SpeculatorOfCommonIds":
        return SpeculatorOfCommonIds(self.speculator.at_places(*places), self.vocab_size)

    def __getattr__(self, name: str):
        return getattr(self.speculator, name)

    def generate_candidates(self, hidden_states: torch.Tensor, input_ids: torch.Tensor, **dials) -> torch.Tensor:
        dials = self.dials | dials
        return self._both_have(self.speculator.generate_candidates(hidden_states, self._known(input_ids), **dials))

    def generate_tree(self, hidden_states: torch.Tensor, input_ids: torch.Tensor, n_tree_nodes: int | None = None):
        drafted = self.speculator.generate_tree(hidden_states, self._known(input_ids), n_tree_nodes, **self.dials)
        return self._both_have(drafted[0]), *drafted[1:]

    def _known(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What it reads in place of an id that it lacks does not matter, so long as it is there."""
        return input_ids.clamp(max=self.config.vocab_size - 1)

    def _both_have(self, drafted: torch.Tensor) -> torch.Tensor:
        return drafted.clamp(max=self.vocab_size - 1)


def beside(model, speculator):
    """What drafts for a base model: the speculator itself where both have the same ids, bound to it if it must be."""
    if isinstance(speculator, CandidateSelection):
        speculator = speculator.beside(model)
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    same = speculator.config.vocab_size in (None, vocab_size)  # None: it drafts what the text holds
    return speculator if same else SpeculatorOfCommonIds(speculator, vocab_size)
