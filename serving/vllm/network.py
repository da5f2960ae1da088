"""MLP speculators of vLLM's layers: the recurrences, as `modeling_speculator.cells` has them, over rows of a batch."""

import math
import re
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from .configuration import MLPSpeculatorConfig, ResidualConfig


class RMSNorm(nn.Module):
    """With weight and bias: `w * x / rms(x) + b`."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6) + self.bias


class Cell(nn.Module):
    """What all cells share. Heads that are tied are one module at several places."""

    has_vocabulary = True  # embeddings and LM heads of its own
    states = 1  # parts of a state, the first of which the LM head reads

    def __init__(self, config: MLPSpeculatorConfig, prefix: str):
        super().__init__()
        self.inner_dim = self.width = config.inner_dim
        self.scale_input = config.scale_input
        state_weight = 0.5 ** (0.5 / config.n_predict)
        self.emb_scale = math.sqrt((1 - state_weight**2) * self.inner_dim / 2) / state_weight

        def lm_head(head: int) -> ParallelLMHead:
            return ParallelLMHead(config.vocab_size, self.inner_dim, prefix=f"{prefix}.head.{head}")

        self.head = repeated(lm_head, config.n_predict, tied=config.tie_weights)

    def first_state(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.scale_input:
            return F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6) / math.sqrt(2)
        return hidden_states

    def advance(self, head: int, state: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """(tokens, emb_dim for head 0, else a state) and (tokens,) -> (tokens, states * width)."""
        raise NotImplementedError


class MultiLayerCell(Cell):
    """The published one (arXiv 2404.19124)."""

    def __init__(self, config: MLPSpeculatorConfig, prefix: str):
        super().__init__(config, prefix)
        inner_dim, n, tied = self.inner_dim, config.n_predict, config.tie_weights
        self.emb = repeated(lambda head: VocabParallelEmbedding(config.vocab_size, inner_dim), n, tied)
        self.ln = repeated(lambda head: RMSNorm(inner_dim), n, tied)
        first = nn.Linear(config.emb_dim, inner_dim, bias=False)
        others = repeated(lambda head: nn.Linear(inner_dim, inner_dim, bias=False), n - 1, tied)
        self.proj = nn.ModuleList([first, *others])

    def advance(self, head: int, state: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        state = torch.add(self.proj[head](state), self.emb[head](input_ids), alpha=self.emb_scale)
        return F.gelu(self.ln[head](state))


class GatedCell(Cell):
    """Arctic's, whose state is the hidden state and the cell state."""

    states = 2

    def __init__(self, config: MLPSpeculatorConfig, prefix: str):
        super().__init__(config, prefix)
        inner_dim, widths = self.inner_dim, [config.emb_dim, self.inner_dim][: config.n_predict]
        self.forget_emb = nn.ModuleList([VocabParallelEmbedding(config.vocab_size, inner_dim)])
        for name in ("forget_proj", "input_proj", "output_proj", "cell_proj"):
            setattr(self, name, nn.ModuleList(nn.Linear(width, inner_dim, bias=False) for width in widths))
        self.cell_ln, self.state_ln = (nn.ModuleList([RMSNorm(inner_dim)]) for _ in range(2))

    def advance(self, head: int, state: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        hidden, cell = (state, None) if head == 0 else state.chunk(2, dim=-1)
        token, at = self.forget_emb[0](input_ids), min(head, 1)

        def read(projections: nn.ModuleList) -> torch.Tensor:
            return torch.add(projections[at](hidden), token, alpha=self.emb_scale)

        new = F.gelu(self.cell_ln[0](read(self.cell_proj))) * read(self.input_proj).sigmoid()
        cell = new if head == 0 else torch.addcmul(new, cell, read(self.forget_proj).sigmoid())
        hidden = F.gelu(self.state_ln[0](cell)) * read(self.output_proj).sigmoid()
        return torch.cat([hidden, cell], dim=-1)


class ResidualCell(nn.Module):
    """The one that adds to the context vector. vLLM puts the base model's embeddings here, and its LM head beside."""

    has_vocabulary = False
    states = 1

    def __init__(self, config: ResidualConfig, prefix: str):
        super().__init__()
        width, inner_dim, n, tied = config.emb_dim, config.inner_dim, config.n_predict, config.tie_weights
        self.width = width
        self.proj_in = repeated(lambda head: nn.Linear(2 * width, inner_dim, bias=False), n, tied)
        self.proj_out = repeated(lambda head: nn.Linear(inner_dim, width, bias=False), n, tied)
        self.state_norm = repeated(lambda head: nn.RMSNorm(width, eps=1e-5), n, tied)
        self.token_norm = repeated(lambda head: nn.RMSNorm(width, eps=1e-5), n, tied)

    def first_state(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    def advance(self, head: int, state: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """(tokens, width) and (tokens,) -> (tokens, width)."""
        token = self.embed_tokens(input_ids).to(state.dtype)
        read = torch.cat([self.state_norm[head](state), self.token_norm[head](token)], dim=-1)
        return state + self.proj_out[head](F.silu(self.proj_in[head](read)))


CELLS = {"sum_rnn": MultiLayerCell, "sum_lstm": GatedCell, "residual": ResidualCell}


class MLPSpeculator(nn.Module):
    """A speculator as vLLM's multi-token prediction calls it: once for each drafted position, on all rows of a batch.

    A row stays where it is from one position to the next, so the states are kept here; what is handed back in their
    place are the context vectors, which need not have the same width.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        check(config, vllm_config)
        cell = self.speculator = CELLS[config.method](config, f"{prefix}.speculator".lstrip("."))
        # Where they are not its own, vLLM puts the base model's in `model.embed_tokens` and `lm_head`.
        self.has_own_embed_tokens = self.has_own_lm_head = cell.has_vocabulary
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("states", torch.zeros(rows, cell.states * cell.width), persistent=False)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    @property
    def model(self) -> nn.Module:
        """Where vLLM looks for what may be shared with the base model."""
        return self.speculator

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of context vectors (tokens, emb_dim) and of the tokens drawn from them (tokens,) ->
        what the LM head of this position reads, (tokens, width), and the context vectors."""
        rows = len(input_ids)
        state = self.states[:rows] if spec_step_idx else self.speculator.first_state(hidden_states)
        state = self.speculator.advance(spec_step_idx, state, input_ids)
        self.states[:rows] = state
        return state[:, : self.speculator.width], hidden_states

    def compute_logits(self, hidden_states: torch.Tensor, spec_step_idx: int = 0) -> torch.Tensor | None:
        """(rows, width), as `forward` returned them -> (rows, vocab_size).

        Of the base model's LM head without what its family does to logits, which changes no order.
        """
        return self.logits_processor(*self._lm_head(spec_step_idx, hidden_states))

    def get_top_tokens(self, hidden_states: torch.Tensor, spec_step_idx: int = 0) -> torch.Tensor:
        """As the arg-max of `compute_logits`, with less between the ranks of tensor parallelism."""
        return self.logits_processor.get_top_tokens(*self._lm_head(spec_step_idx, hidden_states))

    def _lm_head(self, head: int, hidden_states: torch.Tensor) -> tuple[nn.Module, torch.Tensor, torch.Tensor | None]:
        """An LM head, what it reads, and its bias."""
        if self.has_own_lm_head:
            return self.speculator.head[head], hidden_states, None
        return self.lm_head, hidden_states, getattr(self.lm_head, "bias", None)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Takes the weights of a checkpoint; the names that were set, those of tied copies too.

        Raises:
            ValueError: if a weight is missing, too many, or of another shape.
        """
        parameters = dict(self.named_parameters(remove_duplicate=False))
        given, too_many = set(), []
        for name, weight in weights:
            if (name := own_name(name)) is None:
                continue
            if name not in parameters:
                too_many.append(name)
                continue
            try:
                getattr(parameters[name], "weight_loader", default_weight_loader)(parameters[name], weight)
            except (AssertionError, RuntimeError) as error:
                raise ValueError(f"`{name}` of shape {tuple(weight.shape)} does not fit config.json.") from error
            given.add(name)
        filled = {id(parameters[name]) for name in given}
        too_few = sorted(name for name, parameter in parameters.items() if id(parameter) not in filled)
        if too_few or too_many:
            raise ValueError(
                f"The checkpoint does not fit its config.json: it lacks {too_few or 'nothing'} and has "
                f"{too_many or 'nothing'} too many. `python recipes/convert.py` writes one that does."
            )
        return set(parameters)


def repeated(make, n: int, tied: bool) -> nn.ModuleList:
    """n modules, or one n times."""
    if tied and n:
        return nn.ModuleList([make(0)] * n)
    return nn.ModuleList(make(index) for index in range(n))


def own_name(name: str) -> str | None:
    """The name here of a weight of any published form; None for a copy that is not read."""
    name = name if name.startswith("speculator.") else f"speculator.{name}"
    if re.search(r"\.(input|cell|output)_emb\.0\.weight$", name):
        return None  # Arctic's gated form holds its embedding four times
    if re.search(r"\.sketch(_rows)?$", name):
        return None  # by which transformers' model knows its base model
    return re.sub(r"\.(emb|proj|ln)\.(\d+)\.0\.", r".\1.\2.", name)


def check(config: MLPSpeculatorConfig, vllm_config: VllmConfig) -> None:
    """Refuses what would be served wrongly, or not at all, before anything is loaded."""
    speculative, base = vllm_config.speculative_config, vllm_config.speculative_config.target_model_config
    n_tokens = speculative.num_speculative_tokens
    sizes = {"hidden size": (config.emb_dim, base.get_hidden_size())}
    sizes |= {"vocabulary": (config.vocab_size, base.get_vocab_size())}
    if n_tokens > config.n_predict:
        problem = f"`num_speculative_tokens` is {n_tokens}, but the speculator has {config.n_predict} heads"
    elif differ := [f"{what} {ours}, not {theirs}" for what, (ours, theirs) in sizes.items() if ours != theirs]:
        problem = f"the speculator was made for another base model: for {' and '.join(differ)}"
    elif not vllm_config.use_v2_model_runner:
        problem = "it needs vLLM's model runner V2: set the environment variable VLLM_USE_V2_MODEL_RUNNER=1"
    elif vllm_config.parallel_config.pipeline_parallel_size > 1:
        problem = "pipeline parallelism is not supported: use tensor parallelism"
    elif speculative.draft_sample_method != "greedy":
        problem = f"`draft_sample_method` is {speculative.draft_sample_method!r}, which is not tested: leave it out"
    else:
        return
    raise ValueError(f"This MLP speculator can't be served: {problem}.")
