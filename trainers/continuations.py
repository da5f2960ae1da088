"""Text that the base model writes: what stage 2 trains on, and what acceptance is measured on."""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, TemperatureLogitsWarper

from ..candidates import CandidateSelection
from ..checks import check_positions
from ..context_vectors import recorded_states
from ..sampling import gumbel_noise, text_keys, token_keys
from .base_model import read
from .distribution import is_sharded


class Continuations(NamedTuple):
    """What the base model wrote after each prompt; for a context layer, after its prompt, which is m + 1 tokens.

    states: (batch, m + generation_length, emb_dim), the context vectors that the tokens were drawn from.
    tokens: (batch, m + generation_length).
    labels: (batch, generation_length), the last tokens with -100 after an end of text.
    features: (batch, m + generation_length, ...), what enters layers of the base model; None where not asked for.
    segments: (batch, m + generation_length), 0 at padding before a prompt, else 1; None where there is no prompt.
    """

    states: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor | None = None
    segments: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Continuations":
        return Continuations(*(part if part is None else part.to(device) for part in self))

    def starts(self, drafter: CandidateSelection) -> torch.Tensor:
        """(batch, generation_length, emb_dim), what drafts after these tokens start from."""
        states = drafter.with_context(self.states, self.tokens, self.features, self.segments)
        return states[:, self.tokens.shape[1] - self.labels.shape[1] :]


class ContinuationSampler:
    """Continues prompts with the base model, by sampling whose noise belongs to the prompt.

    The same prompt and seed give the same text in every process, batch and attempt, and no random numbers of the
    training are used up.

    Args:
        base_model: as `distribution.place_base_model` has placed it.
        generation_length: tokens after each prompt.
        temperature, top_k: of the distribution that tokens are drawn from (published recipe: 1.0 and 10); greedy at a
            temperature of 0.
        cache_implementation: "static" compiles the forward on a GPU; the context vectors then take another, parallel
            forward over the finished text. With "dynamic" they are recorded while the text is written.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        generation_length: int = 256,
        temperature: float = 1.0,
        top_k: int = 10,
        cache_implementation: str = "dynamic",
    ):
        self.base_model, self.generation_length = base_model, generation_length
        self.is_greedy = temperature == 0
        self.warpers = [TemperatureLogitsWarper(temperature)] if temperature not in (0, 1) else []
        self.top_k = top_k
        eos = base_model.generation_config.eos_token_id
        self.eos_token_ids = torch.tensor([] if eos is None else eos, dtype=torch.long).flatten()
        pad = base_model.generation_config.pad_token_id
        if pad is None:  # anything: it is never predicted
            pad = int(self.eos_token_ids[0]) if len(self.eos_token_ids) else 0
        self.config = GenerationConfig(
            do_sample=False,  # the noise is added to the scores
            max_new_tokens=generation_length,
            eos_token_id=eos,
            pad_token_id=pad,
            cache_implementation=None if cache_implementation == "dynamic" else cache_implementation,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompts: torch.Tensor,
        seed: int,
        mask: torch.Tensor | None = None,
        feature_layers: Sequence[int] | None = None,
    ) -> Continuations:
        """Continues prompts (batch, prompt_length).

        Args:
            mask: (batch, prompt_length), 0 at padding before a prompt; None where there is none.
            feature_layers: for a context layer, which reads the prompts, too: layers whose input it reads.
        """
        if feature_layers is None and self.config.cache_implementation is None:
            with recorded_states(self.base_model) as states:
                tokens = self.write(prompts, seed, mask)[:, prompts.shape[1] :]
            # The prompt's last position, then one position a forward.
            states = torch.cat([part[:, -1:] for part in states[None]], dim=1)
            states = F.pad(states, (0, 0, 0, self.generation_length - states.shape[1]))
            return Continuations(states, tokens, self.labels(tokens))
        return self.read(self.write(prompts, seed, mask), mask, feature_layers)

    @torch.no_grad()
    def read(
        self, texts: torch.Tensor, mask: torch.Tensor | None = None, feature_layers: Sequence[int] | None = None
    ) -> Continuations:
        """What was written, as the base model reads it in one forward.

        Args:
            texts: (batch, prompt_length + generation_length), of `write`.
            mask, feature_layers: as above.
        """
        prompt_length = texts.shape[1] - self.generation_length
        padding = 0 if mask is None else _common_padding(mask)
        texts, prompt_length = texts[:, padding:], prompt_length - padding
        if mask is not None:
            mask = F.pad(mask[:, padding:], (0, self.generation_length - 1), value=1)
        reading = read(self.base_model, texts[:, :-1], attention_mask=mask, feature_layers=feature_layers or ())
        labels = self.labels(texts[:, prompt_length:])
        if feature_layers is None:
            return Continuations(reading.hidden_states[:, prompt_length - 1 :], texts[:, prompt_length:], labels)
        return Continuations(reading.hidden_states, texts[:, 1:], labels, reading.features, mask)

    def write(self, prompts: torch.Tensor, seed: int | torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Prompts and what comes after, (batch, prompt_length + generation_length).

        Args:
            seed: one, or (batch,) of them.
            mask: (batch, prompt_length), 0 at padding before a prompt.
        """
        check_positions(self.base_model, prompts.shape[1] + self.generation_length)
        mask = torch.ones_like(prompts) if mask is None else mask
        if not bool((mask.diff(dim=-1) >= 0).all() & (mask[:, -1] > 0).all()):
            raise ValueError(
                "A prompt's `attention_mask` must be 0 at padding before it, and 1 from there to the end of the row."
            )
        padding = _common_padding(mask)
        processors = [] if self.is_greedy else [*self.warpers, _Draw(text_keys(prompts, seed), padding, self.top_k)]
        with torch.autocast(prompts.device.type, enabled=False), self._own_generation_config():
            texts = self.base_model.generate(
                prompts[:, padding:],
                attention_mask=mask[:, padding:],
                generation_config=self.config,
                logits_processor=processors,
                synced_gpus=is_sharded(self.base_model),
            )
        texts = torch.cat([prompts[:, :padding], texts], dim=1)
        length = prompts.shape[1] + self.generation_length
        return F.pad(texts, (0, length - texts.shape[1]), value=self.config.pad_token_id)

    def labels(self, tokens: torch.Tensor) -> torch.Tensor:
        """Generated tokens (batch, length), with -100 in place of the padding after an end of text."""
        is_end = torch.isin(tokens, self.eos_token_ids.to(tokens.device))
        return tokens.masked_fill(is_end.cumsum(-1) - is_end.long() > 0, -100)

    @contextmanager
    def _own_generation_config(self):
        """Hides the base model's generation config, from which `generate` takes whatever ours does not set."""
        theirs, self.base_model.generation_config = self.base_model.generation_config, GenerationConfig()
        try:
            yield
        finally:
            self.base_model.generation_config = theirs


def _common_padding(mask: torch.Tensor) -> int:
    """Columns at the beginning that hold padding in all rows."""
    return mask.shape[1] - int(mask.sum(-1).max())


class _Draw(LogitsProcessor):
    """Gumbel-max among the `top_k` most probable tokens: the only one that is left is a sample of them."""

    def __init__(self, row_keys: torch.Tensor, padding: int, top_k: int):
        self.row_keys, self.padding, self.top_k = row_keys, padding, top_k

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        positions = torch.full_like(self.row_keys[:, None], self.padding + input_ids.shape[1])
        best, tokens = scores.topk(min(self.top_k, scores.shape[-1]))
        keys = token_keys(scores.shape[-1], scores.device)[tokens]
        noise = gumbel_noise(self.row_keys[:, None], positions, keys[:, None])[:, 0]  # (batch, top_k)
        drawn = tokens.gather(1, (best + noise).argmax(-1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)
