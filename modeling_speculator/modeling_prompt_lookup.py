"""Prompt lookup as a drafter: the text's own repetitions, without a model and without training."""

from transformers import PreTrainedConfig

from .lookup import check_n_lookup_tokens


class PromptLookupConfig(PreTrainedConfig):
    """Dials of prompt lookup; it has no heads, and fits any base model.

    Args:
        n_lookup_tokens: drafted per step, in one branch; a dial, read at each call.
        n_candidates: 0 turns it off; a dial, read at each call.
    """

    model_type = "prompt_lookup"

    n_lookup_tokens: int = 8
    n_candidates: int = 1
    n_predict: int = 0
    vocab_size: int | None = None
    emb_dim: int | None = None


class PromptLookup:
    """Drafts what followed when the text last went as it ends now: `model.generate(assistant_model=PromptLookup())`.

    As `prompt_lookup_num_tokens` of transformers, for batches, samples and compiled steps, too.

    Raises:
        ValueError: if `n_lookup_tokens` is no positive integer.
    """

    def __init__(self, n_lookup_tokens: int = 8):
        check_n_lookup_tokens(n_lookup_tokens, least=1)
        self.config = PromptLookupConfig(n_lookup_tokens=n_lookup_tokens)


__all__ = ["PromptLookup", "PromptLookupConfig"]
