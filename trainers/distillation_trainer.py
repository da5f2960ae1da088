"""Stage 2: the speculator learns to predict what the base model itself generates."""

from contextlib import contextmanager

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel

from .speculator_trainer import SpeculatorTrainer, TrainingBatch
from .training_args import SpeculatorTrainingArguments


class DistillationTrainer(SpeculatorTrainer):
    """`SpeculatorTrainer` on continuations that the base model samples, at temperature 1 with top-k 10, in the loop.

    Args:
        generation_length: tokens generated after each prompt.
        train_dataset, ...: prompts, a column `input_ids` of rows of equal length.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base_model: PreTrainedModel,
        args: SpeculatorTrainingArguments,
        generation_length: int = 256,
        **kwargs,
    ):
        super().__init__(model=model, base_model=base_model, args=args, **kwargs)
        eos = base_model.generation_config.eos_token_id
        self.eos_token_ids = torch.tensor([] if eos is None else eos, dtype=torch.long).flatten().to(args.device)
        pad = base_model.generation_config.pad_token_id
        if pad is None:  # anything: it is never predicted
            pad = int(self.eos_token_ids[0]) if len(self.eos_token_ids) else 0
        self.generation_config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=10,
            max_new_tokens=generation_length,
            eos_token_id=eos,
            pad_token_id=pad,
        )

    def batch(self, inputs: dict[str, torch.Tensor]) -> TrainingBatch:
        """The generated tokens only: the first context vector is that of the prompt's last position."""
        prompts = inputs["input_ids"]
        with torch.autocast(prompts.device.type, enabled=False), self._own_generation_config():
            tokens = self.base_model.generate(
                prompts, attention_mask=torch.ones_like(prompts), generation_config=self.generation_config
            )
        length = prompts.shape[1] + self.generation_config.max_new_tokens
        tokens = F.pad(tokens, (0, length - tokens.shape[1]), value=self.generation_config.pad_token_id)
        is_eos = torch.isin(tokens, self.eos_token_ids)
        is_eos[:, : prompts.shape[1]] = False
        after_end = is_eos.cumsum(-1) - is_eos.long() > 0  # the padding of rows that ended early
        return self.align(tokens, first=prompts.shape[1] - 1, labels=tokens.masked_fill(after_end, -100))

    @contextmanager
    def _own_generation_config(self):
        """Hides the base model's generation config, from which `generate` takes whatever ours does not set."""
        theirs, self.base_model.generation_config = self.base_model.generation_config, GenerationConfig()
        try:
            yield
        finally:
            self.base_model.generation_config = theirs
