"""A drafter that knows the text: what a speculator is tested with, where a trained one would accept too little."""

from types import SimpleNamespace

import torch
from torch.nn import functional as F

from ..configuration_mlp_speculator import MLPSpeculatorConfig
from ..context_vectors import read_context_vectors


class Oracle:
    """Knows the base model's text, and is right with a given probability, on a random branch.

    It finds its place in the text by the context vector, so it is wrong where the loop hands it another one.

    Args:
        model: the base model.
        text: (batch, length), what the model emits, prompt and padding included.
        attention_mask: (batch, <= length), of its beginning, 0 at padding.
        p_right: probability that a drafted token of the right branch is right; 0 and 1 make it certain.
    """

    def __init__(self, model, text, attention_mask=None, n_predict=3, n_candidates=5, p_right=1.0, seed=0):
        config = model.config.get_text_config(decoder=True)
        self.vocab_size = config.vocab_size
        self.config = SimpleNamespace(
            model_type=MLPSpeculatorConfig.model_type,
            n_predict=n_predict,
            n_candidates=n_candidates,
            vocab_size=config.vocab_size,
            emb_dim=config.hidden_size,
        )
        self.device = model.device
        self.text = F.pad(text, (0, n_predict + 1))
        self.p_right = p_right
        self.generator = torch.Generator().manual_seed(seed)
        self.right_branches = []  # of each draft and row
        self.context_vectors = read_context_vectors(
            model, text, torch.ones_like(text) if attention_mask is None else attention_mask
        )

    def generate_candidates(self, hidden_states, input_ids, n_candidates=None):
        """As of `MLPSpeculatorPreTrainedModel`: (batch, n_candidates, n_predict)."""
        batch, n_predict = len(input_ids), self.config.n_predict
        n_candidates = self.config.n_candidates if n_candidates is None else n_candidates
        distance = (self.context_vectors - hidden_states).norm(dim=-1)
        follows = self.text[:, 1 : 1 + distance.shape[1]] == input_ids  # the context vector's token was drawn already
        place = distance.masked_fill(~follows, torch.inf).argmin(-1)  # (batch,)
        device = input_ids.device
        truth = self.text.gather(1, place[:, None] + 2 + torch.arange(n_predict, device=device))
        # All branches are wrong from the first token on, and differ from one another ...
        shift = 1 + torch.arange(n_candidates, device=device) % (self.vocab_size - 1)
        candidates = (truth[:, None, :] + shift[:, None]) % self.vocab_size
        # ... but one, which is right up to the first token that it gets wrong.
        right = (torch.rand(batch, n_predict, generator=self.generator) < self.p_right).to(device)
        branch = torch.randint(n_candidates, (batch,), generator=self.generator)
        candidates[torch.arange(batch, device=device), branch.to(device)] = torch.where(
            right, truth, (truth + 1) % self.vocab_size
        )
        self.right_branches += branch.tolist()
        return candidates
