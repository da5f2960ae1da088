"""The hook that lets `generate` take a speculator as `assistant_model`, and what it returns then."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from .chains import ChainDecoder, check_chain
from .checks import check_models, check_options, check_request
from .decoding import SpeculativeDecoder
from .drafters import is_drafter
from .families import has_recurrent_state
from .request import Request
from .static_decoding import StaticDecoder
from .statistics import SpeculationStatistics
from .transformers_api import CACHE, check_contract, passed_cache


@dataclass
class GenerateSpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `generate(..., return_dict_in_generate=True)` returns with a speculator.

    speculation: what the speculator achieved in this call.
    scores, logits, hidden_states: as without a speculator, but 0 for a row that has ended.
    cache (`past_key_values` before transformers 5.24): the cache that was passed in, else a new `DynamicCache`, of all
        tokens but the last. None where none was passed and rows differ in length, for which a plain cache has no room,
        and with `use_cache=False`.
    """

    speculation: SpeculationStatistics | None = None


class SpeculativeGenerationMixin(GenerationMixin):
    """The two methods of GenerationMixin that a speculator needs otherwise; any other assistant gets the originals."""

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        assistant_model = generation_mode_kwargs.get("assistant_model")
        if isinstance(assistant_model, str):
            raise ValueError(
                f"`assistant_model` is a name, {assistant_model!r}, where a model is expected. Load a speculator with "
                f"`AutoModel.from_pretrained({assistant_model!r})`, a language model with `AutoModelForCausalLM`."
            )
        if not is_drafter(assistant_model):
            return _originals["_validate_generation_mode"](
                self, generation_mode, generation_config, generation_mode_kwargs
            )
        check_contract("generate")
        check_models(self, assistant_model)
        check_options(generation_mode, generation_config)

    def _assisted_decoding(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        assistant_model=None,
        synced_gpus=False,
        streamer=None,
        **kwargs,
    ):
        if not is_drafter(assistant_model):
            return _originals["_assisted_decoding"](
                self,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                assistant_model=assistant_model,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **kwargs,
            )
        request = Request(
            input_ids,
            generation_config,
            logits_processor,
            stopping_criteria,
            past=passed_cache(kwargs),
            model_kwargs={key: value for key, value in kwargs.items() if key not in _LOOP_KWARGS},
            streamer=streamer,
            synced_gpus=bool(synced_gpus),
        )
        check_request(self, request)
        decoder = decoder_for(self, assistant_model, request)
        decoder.run()
        output = build_output(decoder)
        decoder.retire()
        return output


def decoder_for(model, assistant_model, request: Request) -> SpeculativeDecoder:
    """What serves a call."""
    if has_recurrent_state(model):
        check_chain(model, assistant_model, request)
        return ChainDecoder(model, assistant_model, request)
    return (StaticDecoder if request.is_static else SpeculativeDecoder)(model, assistant_model, request)


_HOOKED = ("_validate_generation_mode", "_assisted_decoding")
_originals = {}  # kept when the hook is removed, too: a call may be under way
_installed = set()
_users, _n_users = threading.Lock(), 0  # of `generation_hook`, where the hook was not installed for good
# Arguments of the original loop that are not for the base model's forward.
_LOOP_KWARGS = ("inputs_tensor", "assistant_tokenizer", "tokenizer")


def install_generation_hook() -> None:
    """Lets `generate` of every model accept a speculator as `assistant_model`. Called on import; repeatable."""
    for name in _HOOKED:
        if name not in _installed:
            original = _originals[name] = getattr(GenerationMixin, name)
            # `generate` passes what the signature names, so ours shows the original's.
            hooked = update_wrapper(vars(SpeculativeGenerationMixin)[name], original, assigned=())
            setattr(GenerationMixin, name, hooked)
            _installed.add(name)


def remove_generation_hook() -> None:
    """The inverse of `install_generation_hook`: GenerationMixin is as it was.

    Where another hook was put on top (a repository's own copy of this code), this one stays below it and does nothing.
    """
    for name in list(_installed):
        if getattr(GenerationMixin, name) is vars(SpeculativeGenerationMixin)[name]:
            setattr(GenerationMixin, name, _originals[name])
            _installed.remove(name)


@contextmanager
def generation_hook() -> Iterator[None]:
    """The hook for the time of some calls, in whatever threads; to nobody's surprise after that."""
    with _users:
        global _n_users
        lends = not _installed or _n_users > 0
        _n_users += lends
        install_generation_hook()
    try:
        yield
    finally:
        with _users:
            _n_users -= lends
            if lends and _n_users == 0:
                remove_generation_hook()


def build_output(decoder: SpeculativeDecoder) -> GenerateSpeculativeOutput | torch.Tensor:
    """What `generate` returns, and the caller's cache filled."""
    request = decoder.request
    rows, steps, walk = decoder.rows, decoder.progress.steps, decoder.emission.walk
    sequences = rows.text(decoder.progress.longest).to(request.input_ids.device)
    cache = request.past
    if cache is not None:
        fill_cache(decoder, sequences, cache)
    if not request.generation_config.return_dict_in_generate:
        return sequences
    hands_back = request.generation_config.use_cache and bool((rows.lengths == decoder.progress.longest).all())
    if cache is None and hands_back:
        cache = fill_cache(decoder, sequences, DynamicCache(config=decoder.model.config.get_text_config(decoder=True)))
    return GenerateSpeculativeOutput(
        sequences=sequences,
        scores=walk.recorded(lambda group: group.scores) if request.returns("scores") else None,
        logits=walk.recorded(lambda group: group.logits) if request.returns("logits") else None,
        hidden_states=collect_hidden_states(decoder) if request.returns("hidden_states") else None,
        **{CACHE: cache},
        speculation=SpeculationStatistics.from_counts(
            emitted=torch.tensor([step.n_emitted for step in steps]).view(-1, len(sequences)),
            n_nodes=torch.tensor([step.n_nodes for step in steps]).view(-1, len(sequences)),
            n_candidates=[step.n_candidates for step in steps],
            n_predict=decoder.drafting.depth,
            traces=None if decoder.trace is None else decoder.trace.of_rows(len(sequences)),
        ),
    )


def fill_cache(decoder: SpeculativeDecoder, sequences: torch.Tensor, cache):
    """Fills a cache of transformers with all tokens but the last, as plain decoding leaves it."""
    rows, longest = decoder.rows, decoder.progress.longest
    shortest = int(rows.lengths.min())
    decoder.cache.copy_to(cache, shortest + rows.in_cache_only - 1, release=not decoder.keeps_storage)
    if shortest < longest:  # plain decoding goes on with padding where a row has ended
        columns = torch.arange(shortest - 1, longest - 1, device=sequences.device)
        input_ids = sequences[:, columns].to(decoder.device)
        decoder.model(
            input_ids=input_ids,
            position_ids=rows.from_length + columns.to(decoder.device) + 1,
            use_cache=True,
            **rows.types_of(input_ids),
            **{CACHE: cache},
        )
    tokens = sequences.to(decoder.device)
    decoder.drafting.state.remember(cache, tokens, rows.lengths, rows.in_cache_only)
    return cache


def collect_hidden_states(decoder: SpeculativeDecoder) -> tuple[tuple[torch.Tensor, ...], ...]:
    """For each token the hidden states of each layer: (batch, prompt, size) for the first, (batch, 1, size) then."""
    prompt, *steps = decoder.hidden_states
    if not steps:
        return (prompt,)
    n_tokens = torch.tensor([step.n_emitted for step in decoder.progress.steps])  # (steps, batch)
    along = [torch.arange(step[0].shape[1]) < n[:, None] for step, n in zip(steps, n_tokens, strict=True)]
    emitted = torch.cat(along, dim=1)  # (batch, steps * (depth + 1))
    longest = int(emitted.sum(-1).max())
    order = (~emitted).long().argsort(dim=-1, stable=True)[:, :longest]  # the emitted ones first, in their order
    missing = ~emitted.gather(1, order)
    layers = []
    for layer in zip(*steps, strict=True):
        states = torch.cat(layer, dim=1)
        index = order.to(states.device)[:, :, None].expand(-1, -1, states.shape[-1])
        layers.append(states.gather(1, index).masked_fill(missing.to(states.device)[:, :, None], 0).split(1, dim=1))
    return (prompt, *zip(*layers, strict=True))
