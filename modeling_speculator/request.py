"""What a caller of `generate` asks for, in the terms of the decoding loop."""

from dataclasses import dataclass

import torch
from transformers import Cache, GenerationConfig, StaticCache
from transformers.generation import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from .transformers_api import mask_length, pad_token_id


@dataclass
class Request:
    """What `generate` was asked for, as it hands it to a decoding method.

    past: the caller's cache of an earlier call, None where there is none.
    """

    input_ids: torch.Tensor
    generation_config: GenerationConfig
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    model_kwargs: dict
    past: Cache | None = None
    streamer: object | None = None
    synced_gpus: bool = False

    @property
    def context_length(self) -> int:
        """Columns that the base model has read when it draws the first token: more than `input_ids` has where some
        are in the cache only, or came as `inputs_embeds`."""
        mask, embeds = self.model_kwargs.get("attention_mask"), self.model_kwargs.get("inputs_embeds")
        if mask is not None:
            return mask.shape[1]
        # `generate` drops a mask that masks nothing, and remembers how long it was.
        dropped = mask_length(self.generation_config)
        return (self.input_ids if embeds is None else embeds).shape[1] if dropped is None else dropped

    @property
    def prompt_mask(self) -> torch.Tensor:
        """(batch, context_length), 0 at padding."""
        mask = self.model_kwargs.get("attention_mask")
        return self.input_ids.new_ones(len(self.input_ids), self.context_length) if mask is None else mask

    @property
    def last_positions(self) -> torch.Tensor:
        """(batch, 1), of the last token of each prompt."""
        position_ids, mask = self.model_kwargs.get("position_ids"), self.model_kwargs.get("attention_mask")
        if position_ids is not None:
            last = position_ids[:, -1:]
        elif mask is not None:
            last = mask.long().sum(-1, keepdim=True) - 1
        else:
            last = torch.full((1, 1), self.context_length - 1)
        return last.expand(len(self.input_ids), 1)

    @property
    def last_token_types(self) -> torch.Tensor | None:
        """(batch, 1), of the last token of each prompt and all that come after it; None where none were given."""
        token_types = self.model_kwargs.get("token_type_ids")
        return None if token_types is None else token_types[:, -1:].expand(len(self.input_ids), 1)

    @property
    def max_length(self) -> int:
        return min(c.max_length for c in self.stopping_criteria if type(c) is MaxLengthCriteria)

    @property
    def budget(self) -> int:
        """Tokens to emit at most; one is emitted before anything is asked whether to stop."""
        return max(1, self.max_length - self.input_ids.shape[1])

    @property
    def eos_token_ids(self) -> torch.Tensor | None:
        """(n_eos,)"""
        ids = [c.eos_token_id for c in self.stopping_criteria if type(c) is EosTokenCriteria]
        return torch.cat(ids).unique().to(self.input_ids.device) if ids else None

    @property
    def pad_token_id(self) -> int:
        return pad_token_id(self.generation_config)

    @property
    def is_static(self) -> bool:
        """Whether every step is to have the same shapes."""
        static = self.generation_config.cache_implementation == "static"
        return static or isinstance(self.past, StaticCache)

    @property
    def is_adaptive(self) -> bool:
        return getattr(self.generation_config, "speculation", None) == "adaptive"

    @property
    def traces_speculation(self) -> bool:
        """Whether what was drafted at each step is to be returned."""
        config = self.generation_config
        return bool(config.return_dict_in_generate and getattr(config, "trace_speculation", False))

    def returns(self, what: str) -> bool:
        """Whether `output_<what>` was asked for, in the only form that can hold it."""
        return bool(
            self.generation_config.return_dict_in_generate and getattr(self.generation_config, f"output_{what}")
        )
