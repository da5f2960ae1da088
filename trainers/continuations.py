"""Text that the base model writes: what stage 2 trains on, and what acceptance is measured on."""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, TemperatureLogitsWarper, TopKLogitsWarper

from ..checks import check_positions
from ..sampling import gumbel_noise, text_keys, token_keys
from .base_model import read, recorded_states
from .distribution import is_sharded


class Continuations(NamedTuple):
    """
    states: (batch, generation_length, emb_dim), the context vectors that the tokens were drawn from.
    tokens: (batch, generation_length), what the base model wrote after each prompt.
    labels: the same with -100 after an end of text.
    """

    states: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor


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
        self.warpers.append(TopKLogitsWarper(top_k))
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
    def __call__(self, prompts: torch.Tensor, seed: int) -> Continuations:
        """Continues prompts (batch, prompt_length)."""
        prompt_length = prompts.shape[1]
        if self.config.cache_implementation is None:
            with recorded_states(self.base_model) as states:
                texts = self.write(prompts, seed)
            # The prompt's last position, then one position a forward.
            states = torch.cat([part[:, -1:] for part in states], dim=1)
            states = F.pad(states, (0, 0, 0, self.generation_length - states.shape[1]))
        else:
            texts = self.write(prompts, seed)
            states = read(self.base_model, texts[:, :-1])[:, prompt_length - 1 :]
        tokens = texts[:, prompt_length:]
        return Continuations(states, tokens, self.labels(tokens))

    def write(self, prompts: torch.Tensor, seed: int | torch.Tensor) -> torch.Tensor:
        """Prompts and what comes after, (batch, prompt_length + generation_length); one seed, or (batch,) of them."""
        check_positions(self.base_model, prompts.shape[1] + self.generation_length)
        processors = [] if self.is_greedy else [*self.warpers, _Noise(text_keys(prompts, seed))]
        with torch.autocast(prompts.device.type, enabled=False), self._own_generation_config():
            texts = self.base_model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=self.config,
                logits_processor=processors,
                synced_gpus=is_sharded(self.base_model),
            )
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


class _Noise(LogitsProcessor):
    """Gumbel-max: the most probable token of these scores is a sample of the ones before."""

    def __init__(self, row_keys: torch.Tensor):
        self.row_keys = row_keys

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        positions = torch.full_like(self.row_keys[:, None], input_ids.shape[1])
        tokens = token_keys(scores.shape[-1], scores.device)
        return scores + gumbel_noise(self.row_keys[:, None], positions, tokens)[:, 0]
