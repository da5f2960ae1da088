"""Speculative decoding inside `model.generate(assistant_model=speculator)`: the hook and the loop."""

import threading
from dataclasses import dataclass
from functools import update_wrapper

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from .attention import tree_attention, uses_sdpa
from .cache import SpeculativeCache
from .candidate_tree import CandidateTree
from .checks import check_inputs, check_models, check_options
from .statistics import SpeculationStatistics
from .verification import cut_at_end, verify_greedy


# Assistants that draft for this loop; any other goes transformers' own way.
SPECULATOR_MODEL_TYPES = ("mlp_speculator",)


@dataclass
class GenerateSpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `generate(..., return_dict_in_generate=True)` returns with a speculator.

    speculation: what the speculator achieved in this call.
    past_key_values: a plain `DynamicCache` of all tokens but the last; None where
        the prompt was padded or rows of the batch differ in length: a plain cache has no room for either.
    """

    speculation: SpeculationStatistics | None = None


class SpeculativeGenerationMixin(GenerationMixin):
    """The two methods of GenerationMixin that a speculator needs otherwise; any other assistant gets the originals."""

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        assistant_model = generation_mode_kwargs.get("assistant_model")
        if not is_speculator(assistant_model):
            return _originals["_validate_generation_mode"](
                self, generation_mode, generation_config, generation_mode_kwargs
            )
        check_models(self, assistant_model)
        check_options(generation_mode, generation_config, generation_mode_kwargs)

    def _assisted_decoding(
        self, input_ids, logits_processor, stopping_criteria, generation_config, assistant_model=None, **kwargs
    ):
        if not is_speculator(assistant_model):
            return _originals["_assisted_decoding"](
                self,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                assistant_model=assistant_model,
                **kwargs,
            )
        model_kwargs = {key: value for key, value in kwargs.items() if key not in _LOOP_KWARGS}
        check_inputs(self, generation_config, logits_processor, stopping_criteria, model_kwargs)
        decoder = SpeculativeDecoder(self, assistant_model, generation_config)
        return decoder.generate(input_ids, model_kwargs)


_HOOKED = ("_validate_generation_mode", "_assisted_decoding")
_originals = {}
# Arguments of the original loop that are not for the base model's forward.
_LOOP_KWARGS = ("synced_gpus", "streamer", "inputs_tensor", "assistant_tokenizer", "tokenizer")


def install_generation_hook() -> None:
    """Lets `generate` of every model accept a speculator as `assistant_model`. Called on import; repeatable."""
    for name in _HOOKED:
        if name not in _originals:
            original = _originals[name] = getattr(GenerationMixin, name)
            # `generate` passes what the signature names, so ours shows the original's.
            hooked = update_wrapper(vars(SpeculativeGenerationMixin)[name], original, assigned=())
            setattr(GenerationMixin, name, hooked)


def remove_generation_hook() -> None:
    """The inverse of `install_generation_hook`: GenerationMixin is as transformers wrote it."""
    while _originals:
        name, original = _originals.popitem()
        setattr(GenerationMixin, name, original)


def is_speculator(assistant_model) -> bool:
    """Whether `assistant_model` is one that this package's loop drafts with."""
    config = getattr(assistant_model, "config", None)
    return getattr(config, "model_type", None) in SPECULATOR_MODEL_TYPES


class SpeculativeDecoder:
    """One `generate` call: prefill, then draft, verify, accept, until every sequence has ended.

    All state lives on the device, one row per sequence, each with a length of its own; the host waits for the device
    once per step, to learn whether to stop and how large the next tree is.
    """

    def __init__(self, model, speculator, generation_config: GenerationConfig):
        self.model = model
        self.speculator = speculator
        self.generation_config = generation_config
        self.thread = threading.get_ident()
        self.n_candidates = speculator.config.n_candidates
        self.n_predict = speculator.config.n_predict
        self.max_nodes = 1 + self.n_candidates * self.n_predict

    def generate(self, input_ids: torch.Tensor, model_kwargs: dict) -> GenerateSpeculativeOutput | torch.Tensor:
        """input_ids (batch, prompt), left-padded -> what `GenerationMixin.generate` returns."""
        input_ids = input_ids.to(self.model.device)
        handle = self.model.get_decoder().register_forward_hook(self._record_context_vectors)
        emitted, n_nodes = [], []
        try:
            self.prefill(input_ids, model_kwargs)
            # Inference mode: a tenth less time per step than `no_grad` where the host is the limit.
            with tree_attention(self.model), torch.inference_mode():
                self.draft()
                while not self.all_ended:
                    self.verify()
                    self.accept()
                    emitted.append(self.verified.n_tokens)
                    n_nodes.append(self.tree.n_nodes)
                    self.draft()
        finally:
            handle.remove()
        return self.output(emitted, n_nodes)

    def prefill(self, input_ids: torch.Tensor, model_kwargs: dict) -> None:
        """Runs the prompt the model's own way, into our cache, and emits the first token."""
        batch, length = input_ids.shape
        device = input_ids.device
        eos_token_ids = self.generation_config._eos_token_tensor
        self.eos_token_ids = None if eos_token_ids is None else eos_token_ids.to(device)
        budget = self.generation_config.max_length - length
        layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
        self.cache = SpeculativeCache(layers, capacity=length + budget - 1 + self.max_nodes)
        model_kwargs = model_kwargs | {"past_key_values": self.cache}
        logits = self.model._prefill(input_ids, self.generation_config, model_kwargs).logits[:, -1:]
        mask = model_kwargs.get("attention_mask")  # None where nothing is masked
        dense = mask is None and self.max_nodes == 1 and uses_sdpa(self.model)
        mask = torch.ones_like(input_ids) if mask is None else mask.to(device).long()
        self.cache.start_steps(mask, self.max_nodes, dense)

        self.root_position = mask.sum(-1, keepdim=True) - 1  # (batch, 1), of each row's last token
        self.last_position = self.root_position + budget - 1  # the last token is never run
        self.lengths = torch.full((batch, 1), length, device=device)  # padding included
        self.budget = torch.full((batch,), budget, device=device)
        # Room for what a step writes past a row's end; it is overwritten by the next step, or cut off in the end.
        self.sequences = torch.nn.functional.pad(input_ids, (0, budget + self.n_predict + 1))
        self.along = torch.arange(self.n_predict + 1, device=device)

        self.tree = CandidateTree.root_only(input_ids[:, -1:])
        self.verified = verify_greedy(logits.float(), self.tree)
        self.context_vectors = self.context_vectors[:, -1:]
        self._emit()

    def draft(self) -> None:
        """Drafts after each row's last token, and merges the candidates into a tree no larger than the rows need."""
        if self.n_candidates == 0:
            self.tree = CandidateTree.root_only(self.root)
        else:
            candidates = self.speculator.generate_candidates(self.hidden_states, self.root)
            batch, n_candidates, depth = candidates.shape
            if batch != len(self.root) or n_candidates > self.n_candidates or depth > self.n_predict:
                raise ValueError(
                    f"The speculator drafted {tuple(candidates.shape)} tokens, more than its config's "
                    f"{(len(self.root), self.n_candidates, self.n_predict)}: batch, `n_candidates`, `n_predict`."
                )
            self.tree = CandidateTree.merge(self.root, candidates, self.max_nodes)
        # The one synchronisation of a step.
        left, n_nodes, self.longest = torch.stack(
            [self.budget.max(), self.tree.n_nodes.max(), self.lengths.max()]
        ).tolist()
        self.all_ended = left == 0
        self.tree = self.tree.trim(n_nodes)

    def verify(self) -> None:
        """One forward of the base model over all nodes, each attending to its sequence and its ancestors."""
        mask = self.cache.prepare_step(self.tree.ancestors, in_use=self.longest - 1 + self.max_nodes)
        outputs = self.model(
            input_ids=self.tree.input_ids,
            attention_mask=mask,
            # Nodes past the last token that can be emitted are never accepted; their positions may not exist.
            position_ids=torch.minimum(self.root_position + self.tree.depths, self.last_position),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        # In float32, as `generate` does: equal logits are told apart the same way.
        self.verified = verify_greedy(outputs.logits.float(), self.tree)

    def accept(self) -> None:
        """Emits the accepted tokens, keeps their keys and values, and frees the slots of the others."""
        position = self.root_position
        self._emit()
        self.cache.keep(self.verified.nodes, self.verified.n_tokens, position)

    def _emit(self) -> None:
        """Cuts `verified` where a sequence ends, writes its tokens, and moves the root to the last of them."""
        self.verified, self.budget = cut_at_end(self.verified, self.eos_token_ids, self.budget)
        tokens, nodes, n_tokens = self.verified
        self.sequences.scatter_(1, self.lengths + self.along[: tokens.shape[1]], tokens)
        self.lengths = self.lengths + n_tokens[:, None]
        self.root_position = self.root_position + n_tokens[:, None]
        last = (n_tokens[:, None] - 1).clamp(min=0)  # 0 tokens: the row has ended, and what it drafts is not used
        self.root = tokens.gather(1, last)
        node = nodes.gather(1, last)[:, :, None].expand(-1, -1, self.context_vectors.shape[-1])
        self.hidden_states = self.context_vectors.gather(1, node)  # (batch, 1, emb_dim)

    def output(self, emitted: list[torch.Tensor], n_nodes: list[torch.Tensor]):
        """What `generate` returns, from the (batch,) counts of each step."""
        sequences = self.sequences[:, : self.longest]
        past_end = torch.arange(self.longest, device=sequences.device) >= self.lengths
        pad_token_id = self.generation_config._pad_token_tensor
        sequences = sequences.masked_fill(past_end, 0 if pad_token_id is None else int(pad_token_id))
        if not self.generation_config.return_dict_in_generate:
            return sequences
        none = [self.lengths.new_zeros(0, len(sequences))]
        return GenerateSpeculativeOutput(
            sequences=sequences,
            past_key_values=self.cache.to_dynamic_cache(),
            speculation=SpeculationStatistics.from_counts(
                emitted=torch.vstack(emitted or none), n_nodes=torch.vstack(n_nodes or none), n_predict=self.n_predict
            ),
        )

    def _record_context_vectors(self, module, args, output) -> None:
        if threading.get_ident() == self.thread:  # the model may serve other threads too
            self.context_vectors = output.last_hidden_state  # after the final norm: what enters the LM head
