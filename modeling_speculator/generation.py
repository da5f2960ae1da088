"""Speculative decoding inside `model.generate(assistant_model=speculator)`: the hook, its checks, and the loop."""

import threading
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, GenerationMode, MaxLengthCriteria

from .attention import tree_attention, uses_sdpa
from .cache import SpeculativeCache
from .candidate_tree import CandidateTree
from .configuration_mlp_speculator import MLPSpeculatorConfig
from .statistics import SpeculationStatistics
from .verification import cut_at_end, verify_greedy


# Base models whose output was shown to be reproduced exactly: a family is added with its test.
SUPPORTED_MODEL_TYPES = ("llama", "granite", "gpt_bigcode", "gpt2")
# Assistants that draft for this loop; any other goes transformers' own way.
SPECULATOR_MODEL_TYPES = ("mlp_speculator",)
# What may reach the forward of the base model besides the tokens.
_KNOWN_MODEL_KWARGS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


@dataclass
class GenerateSpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `generate(..., return_dict_in_generate=True)` returns with a speculator.

    speculation: what the speculator achieved in this call.
    past_key_values: a plain `DynamicCache` of all tokens but the last; None where rows of a batch differ in length.
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
        check_inputs(self, input_ids, generation_config, logits_processor, stopping_criteria, model_kwargs)
        decoder = SpeculativeDecoder(self, assistant_model, generation_config)
        return decoder.generate(input_ids, model_kwargs)


# Arguments of the original loop that are not for the base model's forward.
_LOOP_KWARGS = ("synced_gpus", "streamer", "inputs_tensor", "assistant_tokenizer", "tokenizer")
_HOOKED = ("_validate_generation_mode", "_assisted_decoding")
_originals = {}


def install_generation_hook() -> None:
    """Lets `generate` of every model accept a speculator as `assistant_model`. Called on import; repeatable."""
    for name in _HOOKED:
        if name not in _originals:
            _originals[name] = getattr(GenerationMixin, name)
            setattr(GenerationMixin, name, vars(SpeculativeGenerationMixin)[name])


def remove_generation_hook() -> None:
    """The inverse of `install_generation_hook`: GenerationMixin is as transformers wrote it."""
    while _originals:
        name, original = _originals.popitem()
        setattr(GenerationMixin, name, original)


def is_speculator(assistant_model) -> bool:
    """Whether `assistant_model` is one that this package's loop drafts with."""
    config = getattr(assistant_model, "config", None)
    return getattr(config, "model_type", None) in SPECULATOR_MODEL_TYPES


def check_models(model, speculator) -> None:
    """Raises a ValueError where the loop can't serve a base model, or a speculator doesn't fit it."""
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder; speculators draft for decoder-only models. Drop `assistant_model`."
        )
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"Speculation is not supported for {name} (model type {config.model_type!r}), only for "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}. Generate without `assistant_model`."
        )
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"{name} has `rope_type={rope_type!r}`, whose angles depend on the longest position in a forward, drafted "
            "ones included: the output would differ. Generate without `assistant_model`."
        )
    check_shapes(model, speculator)
    if isinstance(speculator.config, MLPSpeculatorConfig):
        speculator.config.check_dials(speculator.config.top_k_tokens_per_head, speculator.config.n_candidates)
    if not uses_sdpa(model) and config._attn_implementation != "eager":
        raise ValueError(
            f"{name} runs with `attn_implementation={config._attn_implementation!r}`, which takes no mask of a "
            'candidate tree. Load it with `attn_implementation="sdpa"` or "eager".'
        )
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(
            f"{name} is spread over several devices, which speculation does not support. Load it on one device."
        )
    device = getattr(speculator, "device", model.device)  # a drafter without weights has none
    if device != model.device:
        raise ValueError(
            f"The speculator is on {device} and {name} on {model.device}. "
            f"Move it with `speculator.to({str(model.device)!r})`."
        )


def check_shapes(model, speculator) -> None:
    """Raises a ValueError where a speculator has another vocabulary or another hidden size than the base model."""
    config = model.config.get_text_config(decoder=True)
    for ours, theirs in (("vocab_size", "vocab_size"), ("emb_dim", "hidden_size")):
        expected, given = getattr(config, theirs), getattr(speculator.config, ours)
        if expected != given:
            trained_for = getattr(speculator.config, "base_model_name_or_path", None) or "another base model"
            raise ValueError(
                f"The speculator has `{ours}={given}`, but {type(model).__name__} has `{theirs}={expected}`: "
                f"it was made for {trained_for}. Take the speculator of this base model."
            )


def check_options(generation_mode, generation_config: GenerationConfig, mode_kwargs: dict) -> None:
    """Raises a ValueError that names a generation option which speculation can't honour."""
    if generation_mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"A speculator can't be combined with {generation_mode.value.replace('_', ' ')}. Set `num_beams=1` and no "
            "other decoding strategy, or drop `assistant_model`."
        )
    not_supported = {
        "do_sample=True": generation_config.do_sample,
        "use_cache=False": not generation_config.use_cache,
        "num_return_sequences > 1": generation_config.num_return_sequences > 1,
        f"cache_implementation={generation_config.cache_implementation!r}": (
            generation_config.cache_implementation not in (None, "dynamic")
        ),
        "output_scores=True": generation_config.output_scores,
        "output_logits=True": generation_config.output_logits,
        "output_attentions=True": generation_config.output_attentions,
        "output_hidden_states=True": generation_config.output_hidden_states,
        "token_healing=True": generation_config.token_healing,
        "synced_gpus=True": mode_kwargs.get("synced_gpus"),
        "a streamer": mode_kwargs.get("streamer") is not None,
    }
    _refuse(name for name, given in not_supported.items() if given)


def check_inputs(model, input_ids, generation_config, logits_processor, stopping_criteria, model_kwargs) -> None:
    """Raises a ValueError for what only shows once `generate` has prepared its inputs; nothing has run by then."""
    cache = model_kwargs.get("past_key_values")
    unknown = sorted(key for key in model_kwargs.keys() - _KNOWN_MODEL_KWARGS if model_kwargs[key] is not None)
    known_criteria = (MaxLengthCriteria, EosTokenCriteria)
    criteria = [type(c).__name__ for c in stopping_criteria if not isinstance(c, known_criteria)]
    _refuse(
        [f"the model input `{key}`" for key in unknown]
        + [f"the logits processor {type(processor).__name__}" for processor in logits_processor]
        + [f"the stopping criterion {name}" for name in criteria]
        + (["`past_key_values` of an earlier call"] if getattr(cache, "_is_user_defined", False) else [])
    )
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if model.config.model_type in ("gpt2", "gpt_bigcode") and generation_config.max_length > longest:
        raise ValueError(
            f"{generation_config.max_length} tokens in all (prompt and `max_new_tokens`) are more than the {longest} "
            "positions that the base model learned. Shorten the prompt or lower `max_new_tokens`."
        )


def _refuse(options) -> None:
    options = list(options)
    if options:
        raise ValueError(f"Speculation does not support {', '.join(options)}. Drop that, or drop `assistant_model`.")


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
        mask = torch.ones_like(input_ids) if mask is None else mask.to(device)
        self.cache.start_steps(mask, self.max_nodes, dense)

        self.root_position = mask.sum(-1, keepdim=True) - 1  # (batch, 1), of each row's last token
        self.last_position = self.root_position + budget
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
