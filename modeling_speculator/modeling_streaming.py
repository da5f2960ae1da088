"""Speculative Streaming (arXiv 2402.11131): further streams in the base model's upper layers guess the next tokens,
one each, while the model verifies the last ones."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .attention import uses_sdpa
from .drafter_state import Call
from .families import decoder_layers, final_norm, shares_keys
from .guests import guests_allowed, linear_layers
from .modeling_bound import BoundCell, BoundConfig, BoundSpeculator
from .stream_adapters import FOLDER, LoRA, key_of, path_of_layers, runs_with, save_as_peft
from .stream_state import StreamState
from .streams import Streams, frozen, read_streams
from .streams_of_nodes import EarlyExit, Pruning
from .transformers_api import attn_implementation, is_checkpointing


class StreamingConfig(BoundConfig):
    """Dials as of `BoundConfig`; `n_streams` is another name for `n_predict`, as stream i drafts what head i does.

    Args:
        n_stream_layers: of the base model, the last ones, that streams run through; 0 means a quarter of them.
        stream_lora_rank: of the adapters (arXiv 2106.09685) on their linear layers, acting on streams alone; 0: none.
        stream_lora_alpha: they are multiplied by `stream_lora_alpha / stream_lora_rank`; 0 means twice the rank.
        n_base_layers: layers of the base model; set when a new speculator is made for one.
        adapted: the linear layers with an adapter, by their name in a layer: [inputs, outputs]; set then, too.
        shared_adapter: whether the adapters act on the main stream, too, as in the paper: the base model is then
            fine-tuned with the streams, and what it writes changes. It is passed with the adapter, which lies beside
            the speculator in peft's format (`adapter/`).
        exit_rank: of the head that guesses from the states below the streams which nodes can be left out; 0: none.
        n_kept_nodes: if set, the nodes of a tree that the upper layers see, its root included: the others are pruned
            before the streams start. A dial, read at each call; only trees are pruned that have more.
        layers_path: where the base model keeps its layers ("model.layers"); set then, too.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    model_type = "speculative_streams"
    methods = ("streaming",)
    attribute_map = BoundConfig.attribute_map | {"n_streams": "n_predict"}

    method: str = "streaming"
    n_stream_layers: int = 0
    stream_lora_rank: int = 8
    stream_lora_alpha: int = 0
    n_base_layers: int = 0
    adapted: dict[str, list[int]] | None = None
    shared_adapter: bool = False
    exit_rank: int = 0
    n_kept_nodes: int | None = None
    layers_path: str | None = None

    def __post_init__(self, n_streams: int | None = None, **kwargs):
        self.n_predict = self.n_predict if n_streams is None else n_streams
        if self.inner_dim not in (0, self.emb_dim) or self.tie_weights or self.scale_input:
            raise ValueError(
                "Streams are as wide as the base model, and have no heads to share: drop `inner_dim`, `tie_weights` "
                "and `scale_input`."
            )
        for name in ("n_stream_layers", "stream_lora_rank", "stream_lora_alpha", "n_base_layers", "exit_rank"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"`{name}` must be an integer of at least 0, but is {value!r}.")
        if self.n_base_layers and self.n_stream_layers > self.n_base_layers:
            raise ValueError(
                f"`n_stream_layers={self.n_stream_layers}` is more than the {self.n_base_layers} layers of the base "
                "model."
            )
        self.adapted = {} if self.adapted is None else self.adapted
        if self.shared_adapter and not self.stream_lora_rank:
            raise ValueError("`shared_adapter` needs an adapter to share: set `stream_lora_rank`.")
        super().__post_init__(**kwargs)

    def check_dials(self, *dials, **named_dials) -> None:
        super().check_dials(*dials, **named_dials)
        n_kept = self.n_kept_nodes
        if n_kept is not None and (type(n_kept) is not int or n_kept < 1 or not self.exit_rank):
            raise ValueError(
                f"`n_kept_nodes` must be None, or an integer of at least 1 beside a trained `exit_rank`, but is "
                f"{n_kept!r} (`exit_rank={self.exit_rank}`)."
            )

    def fit(self, base_model: PreTrainedModel) -> None:
        """Takes over what a new speculator has to know of its base model.

        Raises:
            ValueError: where the streams don't fit into it.
        """
        layers = decoder_layers(base_model)
        self.n_base_layers = len(layers)
        self.n_stream_layers = self.n_stream_layers or math.ceil(len(layers) / 4)
        if self.n_stream_layers > len(layers):
            raise ValueError(
                f"`n_stream_layers={self.n_stream_layers}` is more than the {len(layers)} layers of "
                f"{type(base_model).__name__}."
            )
        found = [linear_layers(layer) for layer in layers[self.first_layer :]]
        if any(other != found[0] for other in found):
            raise ValueError(
                f"The last {self.n_stream_layers} layers of {type(base_model).__name__} differ in their linear "
                "layers: lower `n_stream_layers`, so that those which streams run through are alike."
            )
        self.adapted = {name: list(sizes) for name, sizes in found[0].items()} if self.stream_lora_rank else {}
        self.layers_path = path_of_layers(base_model)

    @property
    def first_layer(self) -> int:
        """The first layer that streams run through."""
        return self.n_base_layers - self.n_stream_layers

    @property
    def stream_lora_scale(self) -> float:
        """What an adapter's product is multiplied by."""
        return (self.stream_lora_alpha or 2 * self.stream_lora_rank) / max(1, self.stream_lora_rank)


class StreamingCell(BoundCell):
    """Stream i of a place starts at layer N - Ns as M + P_i, M the main stream's state there, and runs through the
    last Ns layers; the LM head reads what comes out. A state is the streams of a place, one after the other.

    Attributes:
        embeddings: P, (n_predict, emb_dim).
        adapters: by layer, counted from the first one of the streams, and by name in it. Where the base model runs
            with a shared adapter, they are only what that is recognised by.
        exit: guesses below the streams' first layer; None without pruning.
    """

    reads_tokens = False
    reads_text = True
    drafts_after_prompt = False

    def __init__(self, config: StreamingConfig):
        super().__init__(config)
        self.embeddings = nn.Parameter(torch.zeros(config.n_predict, config.emb_dim))
        self.adapters = nn.ModuleList()
        self.runs_with_them, self.next_token_states = False, ()  # but in what `bound` returns
        self.exit = EarlyExit(config.emb_dim, config.exit_rank) if config.exit_rank else None
        self._add_adapters()

    def _add_adapters(self) -> None:
        config = self.config
        for _ in range(config.n_stream_layers if config.adapted else 0):
            adapter = partial(LoRA, rank=config.stream_lora_rank, scale=config.stream_lora_scale)
            of_layer = {key_of(name): adapter(*sizes) for name, sizes in config.adapted.items()}
            self.adapters.append(nn.ModuleDict(of_layer))

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """What streams start from is what enters their first layer."""
        return (self.config.first_layer,)

    @property
    def streams(self) -> Streams:
        first, shared = self.config.first_layer, self.config.shared_adapter
        if self.runs_with_them:
            return Streams(self.embeddings, first, (), ())
        return Streams(self.embeddings, first, self.adapters, tuple(self.config.adapted), adapt_main=shared)

    def bound(self, base_model: PreTrainedModel) -> "StreamingCell":
        cell = super().bound(base_model)
        cell.runs_with_them = self.config.shared_adapter and self._lacking(base_model) is None
        return cell

    def _lacking(self, base_model: PreTrainedModel) -> str | None:
        """A linear layer of the base model that does not run with its adapter here; None where all do."""
        layers = decoder_layers(base_model)[self.config.first_layer :]
        for layer, adapters in zip(layers, self.adapters, strict=False):
            for name in self.config.adapted:
                if not runs_with(layer.get_submodule(name), adapters[key_of(name)]):
                    return name
        return None

    def check_training(self, base_model: PreTrainedModel) -> None:
        layers = decoder_layers(base_model)
        if self.config.shared_adapter and any(hasattr(part, "base_layer") for part in layers.modules()):
            raise ValueError(
                f"{type(base_model).__name__} has an adapter already, beside which one that is shared with streams "
                "can't be trained. Pass the base model without the streams' own, which they bring along; merge any "
                "other into it first (`merge_and_unload`)."
            )

    def check_generation(self, base_model: PreTrainedModel) -> None:
        if self.config.shared_adapter and (name := self._lacking(base_model)):
            raise ValueError(
                f"These streams share an adapter with the base model, but {name} of {type(base_model).__name__} runs "
                f"without it, or with another one. Pass the model with the adapter that lies beside the speculator "
                f"({FOLDER}/), as `AutoModelForCausalLM.from_pretrained` loads it, and leave it on."
            )

    def fit(self, base_model: PreTrainedModel) -> None:
        if not self.config.n_base_layers:
            self.config.fit(base_model)
            self._add_adapters()
            for adapter in (part for part in self.adapters.modules() if isinstance(part, LoRA)):
                adapter.start()

    def check_base_model(self, base_model: PreTrainedModel) -> None:
        super().check_base_model(base_model)
        layers, config, name = decoder_layers(base_model), self.config, type(base_model).__name__
        if shares_keys(base_model):
            raise ValueError(f"The last layers of {name} have no keys of their own, which streams would attend to.")
        attention = attn_implementation(base_model.config.get_text_config(decoder=True))
        if not uses_sdpa(base_model) and attention != "eager":
            raise ValueError(
                f"{name} runs with `attn_implementation={attention!r}`, which takes no mask of streams. Load it with "
                '`attn_implementation="sdpa"` or "eager".'
            )
        if base_model.training and is_checkpointing(base_model):
            raise ValueError(
                f"{name} is training with gradient checkpointing, which allows no cache. Call `eval()` first."
            )
        if len(layers) != config.n_base_layers:
            raise ValueError(
                f"The streams were made for a base model of {config.n_base_layers} layers, but {name} has "
                f"{len(layers)}: take the streams of this base model."
            )
        found = linear_layers(layers[-1])
        wrong = [part for part, sizes in config.adapted.items() if found.get(part) != tuple(sizes)]
        if wrong:
            raise ValueError(
                f"The streams adapt {', '.join(wrong)}, which {name} does not have, or not in these sizes: take the "
                "streams of this base model."
            )

    def first_state(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    def advance(self, head: int, state: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return state if head == 0 else state.roll(-self.inner_dim, dims=-1)

    def features(self, state: torch.Tensor) -> torch.Tensor:
        return super().features(state[..., : self.inner_dim])

    def start(self, call: Call) -> StreamState:
        base_model, n_kept = self._ends().base_model, self.config.n_kept_nodes
        return StreamState(
            self.streams, base_model, call, None if n_kept is None else Pruning(self.exit, n_kept, base_model)
        )

    def guest_slots(self, max_nodes: int) -> dict[int, int]:
        n_slots = min(max_nodes, self.config.n_kept_nodes or max_nodes) * self.config.n_predict
        return dict.fromkeys(range(self.config.first_layer, self.config.n_base_layers), n_slots)

    def guests_allowed(self) -> AbstractContextManager:
        return guests_allowed(self._ends().base_model, self.streams.adapted)

    def with_context(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        features: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, n, n_predict * emb_dim); `features` are what enters the first layer of the streams."""
        base_model = self._ends().base_model
        leaving, main = read_streams(base_model, self.streams, features, segments)
        self.next_token_states = (main,) if self.streams.adapt_main else ()
        if self.exit is not None:
            with frozen(base_model):
                self.next_token_states += (final_norm(base_model)(self.exit(features.to(base_model.dtype))),)
        return leaving


class StreamingSpeculator(BoundSpeculator):
    """Streams as a speculator: `model.generate(assistant_model=streams)`, and the text is the base model's own."""

    config_class = StreamingConfig
    cells = {"streaming": StreamingCell}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LoRA):
            module.start()
        elif isinstance(module, StreamingCell):
            init.zeros_(module.embeddings)
        elif isinstance(module, EarlyExit):
            init.kaiming_uniform_(module.A.weight, a=math.sqrt(5))
            init.zeros_(module.B.weight)
        if not isinstance(module, nn.Linear):
            super()._init_weights(module)

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        """`PreTrainedModel.save_pretrained`; a shared adapter is also written in peft's format, beside it."""
        if is_main_process and self.config.shared_adapter:
            weights = self.state_dict() if state_dict is None else state_dict
            self._save_adapter(Path(save_directory) / FOLDER, weights)
        return super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)

    def _save_adapter(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        config, named = self.config, {}
        for at in range(config.n_stream_layers):
            for name in config.adapted:
                for part in ("lora_A", "lora_B"):
                    weight = weights[f"speculator.adapters.{at}.{key_of(name)}.{part}.weight"]
                    named[f"{config.layers_path}.{config.first_layer + at}.{name}", part] = weight
        save_as_peft(folder, named, config.stream_lora_scale, config.base_model_name_or_path)


__all__ = ["StreamingCell", "StreamingConfig", "StreamingSpeculator"]
