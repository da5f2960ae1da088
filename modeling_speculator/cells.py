"""The recurrences of speculators: what a head makes of the state before it and of a token.

A state is one tensor, so that drafting can repeat and gather it without knowing the cell.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .configuration_mlp_speculator import MLPSpeculatorConfig
from .drafter_state import Call, DrafterState, LastContextVector


class MLPSpeculatorRMSNorm(nn.Module):
    """RMS norm with weight and bias: `w * x / rms(x) + b`."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6) + self.bias


def starting_as(what: str, linear: nn.Linear) -> nn.Linear:
    """A linear layer of a new speculator that starts as "zero", as the "identity" of its first inputs, or as
    "noise" that keeps the size of what it reads."""
    linear.starts_as = what
    return linear


class Cell(nn.Module):
    """What all cells share: the LM heads, the first state, and how a head's logits come from a state.

    The names of the modules are those of the published checkpoints.
    """

    reads_tokens = True  # whether a state depends on the drafted tokens, and so differs between branches
    needs_base_model = False  # whether it uses layers of the base model, to which `bound` binds it
    reads_text = False  # whether the first state depends on other verified tokens than the last
    reads_prompt = False  # whether its state in a call of `generate` wants to know the prompt
    copied_per_place = 0  # numbers that `at_places` copies for each place
    drafts_after_prompt = True  # or from the second step of a call on
    feature_layers: tuple[int, ...] = ()  # layers of the base model, what enters which is read, too
    # After `with_context`: further states (batch, n, emb_dim) that are trained to say which token was drawn, such as
    # the base model's own where its training changes them.
    next_token_states: tuple[torch.Tensor, ...] = ()

    def __init__(self, config: MLPSpeculatorConfig):
        super().__init__()
        self.inner_dim = config.inner_dim or config.emb_dim
        self.scale_input = config.scale_input
        # How much of the state comes from the state before and how much from the token, so that its variance is kept.
        state_weight = 0.5 ** (0.5 / config.n_predict)
        emb_weight = math.sqrt((1 - state_weight**2) * self.inner_dim / 2)
        self.emb_scale = emb_weight / state_weight

    def lm_heads(self, config: MLPSpeculatorConfig) -> nn.ModuleList:
        """What a cell keeps as `head`."""
        return nn.ModuleList(nn.Linear(self.inner_dim, config.vocab_size, bias=False) for _ in range(config.n_predict))

    def first_state(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Context vectors (..., emb_dim) -> what head 0 starts from, in the speculator's dtype."""
        hidden_states = hidden_states.to(self.head[0].weight.dtype)
        if self.scale_input:
            hidden_states = F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6) / math.sqrt(2)
        return hidden_states

    def freeze_unread(self) -> None:
        """Takes weights that nothing reads out of training, where a checkpoint holds such."""

    def fit(self, base_model: PreTrainedModel) -> None:
        """Takes over sizes of the base model that its config does not say, where the cell is new."""

    def start_from(self, base_model: PreTrainedModel) -> None:
        """Takes over weights of the base model that a new speculator starts from; by default none."""

    def bound(self, base_model: PreTrainedModel) -> "Cell":
        """The cell as it drafts and is trained beside a base model: itself, unless it uses layers of that one."""
        return self

    def check_base_model(self, base_model: PreTrainedModel) -> None:
        """Raises a ValueError where the cell uses layers of the base model, and was trained beside another one."""

    def check_training(self, base_model: PreTrainedModel) -> None:
        """Raises a ValueError where the base model of a training is not as the cell needs it to learn."""

    def check_generation(self, base_model: PreTrainedModel) -> None:
        """Raises a ValueError where the base model of a call of `generate` is not as the cell needs it to draft."""

    def start(self, call: Call) -> DrafterState:
        """What is known of the tokens of a call of `generate`; its `context_vector` is what a draft starts from."""
        return LastContextVector(call)

    def between(self, start: int, end: int, n: int) -> "Cell":
        """After `with_context`: the cell as it is fed some of the last `n` places of texts, from `start` to `end`."""
        return self

    def at_places(self, rows: torch.Tensor, places: torch.Tensor, n: int) -> "Cell":
        """After `with_context`: the cell as it drafts at single places of it.

        Args:
            rows, places: (m,), of the last `n` places of a text each.
        """
        return self

    def guest_slots(self, max_nodes: int) -> dict[int, int]:
        """Of each layer of the base model in which it has rows of its own beside nodes, how many at most."""
        return {}

    def with_context(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        features: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What a draft starts from at all places of a text at once: (batch, n, emb_dim).

        Args:
            hidden_states: (batch, n, emb_dim), context vectors.
            input_ids: (batch, n), the token drawn from each.
            features: (batch, n, emb_dim * number of `feature_layers`), what enters these layers; None without.
            segments: (batch, n), a number for each document, and for padding: those of others are not seen. None
                where each row is one text.
        """
        return hidden_states

    @staticmethod
    def tied_weights(n_predict: int) -> dict[str, str]:
        """{weight: weight it is tied to} where the config ties weights."""
        return {}

    @torch.no_grad()
    def resize_vocabulary(self, vocab_size: int, fill: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        """Gives all embeddings and LM heads another number of tokens; what is tied stays tied.

        Args:
            fill: called with new rows, to be filled, and the old ones.
        """
        resized = {}
        for module in [*(part for part in self.modules() if isinstance(part, nn.Embedding)), *self.head]:
            old = module.weight
            if old not in resized:
                weight = old.new_empty(vocab_size, old.shape[1])
                weight[: len(old)] = old[:vocab_size]
                if vocab_size > len(old):
                    fill(weight[len(old) :], old)
                resized[old] = nn.Parameter(weight, requires_grad=old.requires_grad)
            module.weight = resized[old]
            setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", vocab_size)

    def advance(self, head: int, state: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """One step of the recurrence: the state after `input_ids`.

        Args:
            state: (..., emb_dim) for head 0, else what the step before returned.
            input_ids: (...), the token that head `head - 1` stands for (the base model's own for head 0).

        Returns:
            (..., a multiple of inner_dim).
        """
        raise NotImplementedError

    def features(self, state: torch.Tensor) -> torch.Tensor:
        """What an LM head reads of a state that `advance` returned: (..., inner_dim)."""
        return state[..., : self.inner_dim]

    def lm_head(self, head: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes logits (..., vocab) of a head's features; its `out_features` says how many."""
        return self.head[head]

    def draft_head(self, head: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor | None]:
        """What is trained: `lm_head`, or what scores the tokens that can be drafted, and their ids, ascending."""
        return self.lm_head(head), None

    def draft_logits(
        self, head: int, features: torch.Tensor, vocab_size: int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (..., n) of what can be drafted, and the ids of these n tokens, None where it is the first n.

        Args:
            vocab_size: if given, tokens from here on are none.
        """
        return self.lm_head(head)(features)[..., :vocab_size], None

    def step(self, head: int, state: torch.Tensor, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`advance`, and the logits (..., vocab) of the token after `input_ids`."""
        state = self.advance(head, state, input_ids)
        return state, self.lm_head(head)(self.features(state))

    def best_children(
        self, head: int, state: torch.Tensor, input_ids: torch.Tensor, k: int, vocab_size: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The state after `input_ids` (batch, n), and the k most probable tokens then: log-probs, tokens (..., k).

        Args:
            vocab_size: if given, tokens from here on are none.
        """
        n = input_ids.shape[1]
        if not self.reads_tokens:  # all branches are the same
            state, input_ids = state[:, :1], input_ids[:, :1]
        state = self.advance(head, state, input_ids)
        logits, ids = self.draft_logits(head, self.features(state), vocab_size)
        best, tokens = logits.topk(k)
        tokens = tokens if ids is None else ids[tokens]
        best = best.float() - logits.float().logsumexp(-1, keepdim=True)
        if not self.reads_tokens:
            state, best, tokens = (part.repeat(1, n, 1) for part in (state, best, tokens))
        return state, best, tokens


class MLPSpeculator(Cell):
    """`method: sum_rnn`, the published MLP speculator (arXiv 2404.19124; foundation-model-stack/fms-extras)."""

    def __init__(self, config: MLPSpeculatorConfig):
        super().__init__(config)
        heads, inner_dim = range(config.n_predict), self.inner_dim
        self.emb = nn.ModuleList(nn.Embedding(config.vocab_size, inner_dim) for _ in heads)
        self.proj = nn.ModuleList(nn.Linear(inner_dim if i else config.emb_dim, inner_dim, bias=False) for i in heads)
        self.head = self.lm_heads(config)
        self.ln = nn.ModuleList(MLPSpeculatorRMSNorm(inner_dim) for _ in heads)

    def advance(self, head: int, state: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        state = torch.add(self.proj[head](state), self.emb[head](input_ids), alpha=self.emb_scale)
        return F.gelu(self.ln[head](state))

    @staticmethod
    def tied_weights(n_predict: int) -> dict[str, str]:
        """The heads share all but the first projection, which has another shape."""
        tied = {}
        for head in range(1, n_predict):
            tied |= {f"{name}.{head}.weight": f"{name}.0.weight" for name in ("emb", "head", "ln")}
            tied[f"ln.{head}.bias"] = "ln.0.bias"
            if head > 1:
                tied[f"proj.{head}.weight"] = "proj.1.weight"
        return tied


class GatedMLPSpeculator(Cell):
    """`method: sum_lstm`, the gated cell of Snowflake's Arctic speculators (Arctic Inference); the heads share it.

    A state is the hidden state and the cell state, one after the other.
    """

    def __init__(self, config: MLPSpeculatorConfig):
        super().__init__(config)
        widths = [config.emb_dim, self.inner_dim][: config.n_predict]

        def projections() -> nn.ModuleList:
            return nn.ModuleList(nn.Linear(width, self.inner_dim, bias=False) for width in widths)

        self.forget_emb = nn.ModuleList([nn.Embedding(config.vocab_size, self.inner_dim)])  # for all four
        self.forget_proj, self.input_proj, self.output_proj, self.cell_proj = (projections() for _ in range(4))
        self.head = self.lm_heads(config)
        self.cell_ln = nn.ModuleList([MLPSpeculatorRMSNorm(self.inner_dim)])
        self.state_ln = nn.ModuleList([MLPSpeculatorRMSNorm(self.inner_dim)])
        self.freeze_unread()

    def freeze_unread(self) -> None:
        # There is no cell state yet to forget: the published files hold this weight, but nothing reads it.
        self.forget_proj[0].requires_grad_(False)

    def advance(self, head: int, state: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        hidden, cell = (state, None) if head == 0 else state.chunk(2, dim=-1)
        token, at = self.forget_emb[0](input_ids), min(head, 1)

        def read(projections: nn.ModuleList) -> torch.Tensor:
            return torch.add(projections[at](hidden), token, alpha=self.emb_scale)

        new = F.gelu(self.cell_ln[0](read(self.cell_proj))) * read(self.input_proj).sigmoid()
        cell = new if head == 0 else torch.addcmul(new, cell, read(self.forget_proj).sigmoid())
        hidden = F.gelu(self.state_ln[0](cell)) * read(self.output_proj).sigmoid()
        return torch.cat([hidden, cell], dim=-1)

    @staticmethod
    def tied_weights(n_predict: int) -> dict[str, str]:
        return {f"head.{head}.weight": "head.0.weight" for head in range(1, n_predict)}


CELLS = {"sum_rnn": MLPSpeculator, "sum_lstm": GatedMLPSpeculator}
