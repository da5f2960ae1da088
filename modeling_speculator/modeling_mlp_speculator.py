"""The speculator as a model: heads over a context vector and the tokens drawn after it, for training and for drafting.

Architecture and initialisation: arXiv 2404.19124 and its published implementation (foundation-model-stack/fms-extras).
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .cells import CELLS, MLPSpeculatorRMSNorm
from .configuration_mlp_speculator import DIALS, MLPSpeculatorConfig
from .formats import KEY_MAPPING, REPEATED_KEYS


@dataclass
class MLPSpeculatorOutput(ModelOutput):
    """
    loss: scalar, the sum of `losses`; None without labels.
    logits: (n_predict, batch, n, vocab).
    losses: (n_predict,), the mean cross-entropy of each head; None without labels.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    losses: torch.Tensor | None = None


class MLPSpeculatorPreTrainedModel(PreTrainedModel):
    """An MLP speculator: load it with `from_pretrained`, draft with `model.generate(assistant_model=speculator)`."""

    config_class = MLPSpeculatorConfig
    base_model_prefix = "speculator"
    main_input_name = "hidden_states"
    _keys_to_ignore_on_load_unexpected = REPEATED_KEYS
    cells = CELLS  # by the config's `method`
    loaded_revision = None  # of a repository on the Hub

    def __init__(self, config: MLPSpeculatorConfig):
        super().__init__(config)
        self.speculator = self.cells[config.method](config)
        tied = self.speculator.tied_weights(config.n_predict)  # honoured where config.tie_weights is set
        self._tied_weights_keys = {f"speculator.{key}": f"speculator.{source}" for key, source in tied.items()}
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=(self.config.inner_dim or self.config.emb_dim) ** -0.5)
        elif isinstance(module, MLPSpeculatorRMSNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Embedding | None:
        return next((module for module in self.speculator.modules() if isinstance(module, nn.Embedding)), None)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding | None:
        """`PreTrainedModel.resize_token_embeddings`, for the embeddings and LM heads of all heads.

        Needed only to train the speculator on tokens that were added: it drafts for a base model with some more or
        less as it is.

        Args:
            new_num_tokens: as the base model has; None leaves the number.
            pad_to_multiple_of: rounds it up.
            mean_resizing: whether new tokens start as the mean of the others, or as in a new speculator.

        Raises:
            ValueError: if fewer tokens are left than a head drafts.
        """
        vocab_size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            vocab_size = -(-vocab_size // pad_to_multiple_of) * pad_to_multiple_of
        self.config.check_dials(*(getattr(self.config, dial) for dial in DIALS), vocab_size=vocab_size)

        def fill(new: torch.Tensor, old: torch.Tensor) -> None:
            if mean_resizing:
                new.copy_(old.float().mean(0))
            else:
                new.normal_(std=self.speculator.inner_dim**-0.5)

        if vocab_size != self.config.vocab_size:
            self.speculator.resize_vocabulary(vocab_size, fill)
            self.config.vocab_size = vocab_size
        return self.get_input_embeddings()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """`PreTrainedModel.from_pretrained` that never half-loads.

        Raises:
            ValueError: if the checkpoint lacks a weight, has one too many, or one of another shape, or if its
                config ties weights that differ.
        """
        kwargs["ignore_mismatched_sizes"] = True  # so that they are named below
        kwargs["key_mapping"] = KEY_MAPPING | (kwargs.get("key_mapping") or {})
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        problems = [f"{kind}: {sorted(map(str, info[kind]))}" for kind in info if info[kind]]
        tied = model.speculator.tied_weights(model.config.n_predict) if model.config.tie_weights else {}
        differ = sorted({f"speculator.{key}" for key in tied} - model.all_tied_weights_keys.keys())
        if differ:
            problems.append(f"weights that `tie_weights` ties, yet differ: {differ}")
        if problems:
            raise ValueError(
                f"The weights in {str(pretrained_model_name_or_path)!r} don't fit its config.json "
                f"({'; '.join(problems)}). Check `n_predict`, `emb_dim`, `inner_dim`, `vocab_size` and `tie_weights` "
                "there, and that the download is complete."
            )
        model.loaded_revision = kwargs.get("revision")
        model.speculator.freeze_unread()
        return (model, info) if output_loading_info else model

    def push_to_hub(
        self,
        repo_id: str,
        version: str | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        **options,
    ):
        """Sends the speculator to the Hub with its card and code, as recipes/push_to_hub.py does.

        Args:
            version: as "1.0.0", which becomes the tag "v1.0.0"; None: no tag.
            revision: a branch; by default main.
            options: of `modeling_speculator.model_cards.publish`, which says what is returned and raised.
        """
        # By name: the code that a repository on the Hub carries is this, without that package.
        publishing = importlib.import_module("modeling_speculator.model_cards.publishing")
        options |= {"branch": revision or "main", "message": commit_message}
        return publishing.publish_model(self, repo_id, version, **options)

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        """`PreTrainedModel.save_pretrained`; where it pushes, the other arguments are those of `push_to_hub` here.

        Raises:
            ValueError: for other weights than the model's, which are not what would be pushed.
        """
        own_names = {"save_original_format": False}  # else those of another form that it was read from
        if not push_to_hub:
            return super().save_pretrained(save_directory, is_main_process, state_dict, **own_names | kwargs)
        if state_dict is not None:
            raise ValueError("Load `state_dict` into the speculator, then push it.")
        super().save_pretrained(save_directory, is_main_process, **own_names)
        repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
        return self.push_to_hub(repo_id, **kwargs) if is_main_process else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        objective: Callable | None = None,
    ) -> MLPSpeculatorOutput:
        """All heads at all positions at once, each head fed the true tokens: the training forward.

        Args:
            hidden_states: (batch, n, emb_dim), context vectors of the base model.
            input_ids: (batch, >= n + n_predict - 1), `input_ids[:, i]` the token drawn from `hidden_states[:, i]`.
            labels: (batch, n + n_predict - 1), `labels[:, i + j]` what head `i` shall predict at position `j`;
                -100 is ignored.
            objective: what a trainer computes in place of the logits of all heads, which may not fit into memory:
                called with this model's `speculator` and the three tensors, its result is returned.

        Raises:
            ValueError: if the lengths don't fit together.
        """
        n_predict, n = self.config.n_predict, hidden_states.shape[1]
        needed = n + n_predict - 1
        if input_ids.shape[1] < needed or (labels is not None and labels.shape[1] != needed):
            raise ValueError(
                f"{n} context vectors and {n_predict} heads need `input_ids` of at least, and `labels` of exactly, "
                f"n + n_predict - 1 = {needed} tokens; got {input_ids.shape[1]}"
                + (f" and {labels.shape[1]}." if labels is not None else ".")
            )
        if objective is not None:
            return objective(self.speculator, hidden_states, input_ids, labels)
        state, logits = self.speculator.first_state(hidden_states), []
        for head in range(n_predict):
            state, head_logits = self.speculator.step(head, state, input_ids[:, head : head + n])
            logits.append(head_logits)
        output = MLPSpeculatorOutput(logits=torch.stack(logits))
        if labels is not None:
            output.losses = torch.stack(
                [mean_cross_entropy(head_logits, labels[:, i : i + n]) for i, head_logits in enumerate(logits)]
            )
            output.loss = output.losses.sum()
        return output

    @torch.no_grad()
    def generate_candidates(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        top_k_tokens_per_head: list[int] | None = None,
        n_candidates: int | None = None,
        vocab_size: int | None = None,
    ) -> torch.Tensor:
        """Drafts by the published rule: `top_k` children per node, the leaves with the highest summed log-prob.

        Args:
            hidden_states: (batch, 1, emb_dim), context vector of each sequence.
            input_ids: (batch, 1), the token that the base model drew from it.
            top_k_tokens_per_head, n_candidates: default to the config's.
            vocab_size: if given, ids from here on are not drafted.

        Returns:
            (batch, n_candidates, n_predict) token ids, best first; fewer where `config.n_heads` says so.

        Raises:
            ValueError: if the dials don't fit the heads.
        """
        config = self.config
        top_k = config.top_k_tokens_per_head if top_k_tokens_per_head is None else list(top_k_tokens_per_head)
        n_candidates = config.n_candidates if n_candidates is None else n_candidates
        config.check_dials(top_k, n_candidates, n_heads=config.n_heads)
        top_k = top_k[: config.n_heads]

        batch = len(input_ids)
        state = self.speculator.first_state(hidden_states)  # (batch, 1, emb_dim)
        candidates = input_ids[:, :, None]  # (batch, branches, tokens so far)
        log_probs = 0.0
        for head, k in enumerate(top_k):
            state, best, tokens = self.speculator.best_children(head, state, candidates[:, :, -1], k, vocab_size)
            log_probs = (log_probs + best).view(batch, -1, 1)
            candidates = torch.cat([candidates.repeat_interleave(k, dim=1), tokens.view(batch, -1, 1)], dim=-1)
            if head < len(top_k) - 1:
                state = state.repeat_interleave(k, dim=1)
        leaves = log_probs.squeeze(-1).topk(n_candidates).indices  # (batch, n_candidates)
        return candidates[:, :, 1:].gather(1, leaves[:, :, None].expand(-1, -1, len(top_k)))

    @torch.no_grad()
    def generate_tree(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        n_tree_nodes: int | None = None,
        vocab_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Drafts the `n_tree_nodes` most probable nodes of the tree that `top_k_tokens_per_head` spans.

        At equal numbers of nodes they hold more probability than the paths to the most probable leaves, which
        `generate_candidates` drafts. (EAGLE-2, arXiv 2406.16858, section 4, ranks its nodes the same way.)

        Args:
            hidden_states: (batch, 1, emb_dim), context vector of each sequence.
            input_ids: (batch, 1), the token that the base model drew from it.
            n_tree_nodes: defaults to the config's.
            vocab_size: if given, ids from here on are not drafted.

        Returns:
            Tokens, parents and depths, (batch, n_tree_nodes), level by level. Parents are numbered as nodes of the
            tree: 0 is `input_ids`, 1 the first that is returned here.
        """
        n_nodes, batch = n_tree_nodes or self.config.n_tree_nodes, len(input_ids)
        state = self.speculator.first_state(hidden_states)
        token, log_prob = input_ids, hidden_states.new_zeros(batch, 1, dtype=torch.float32)
        levels = []  # of each: tokens, log-probs, parents and depths, (batch, width)
        first, width = 0, 1  # node and width of the level before; the root is node 0
        top_k = self.config.top_k_tokens_per_head[: self.config.n_heads]
        for head, k in enumerate(top_k):
            state, best, tokens = self.speculator.best_children(head, state, token, k, vocab_size)
            # At most 0: rounding must not make a child more probable than its parent, nor must NaN.
            best = torch.where(best <= 0, best, torch.where(best > 0, 0.0, -torch.inf))
            log_prob = (log_prob[:, :, None] + best).flatten(1)  # (batch, width * k)
            # What is not among the best of its level is not among the best of all.
            log_prob, kept = log_prob.topk(min(n_nodes, log_prob.shape[1]))
            parent = kept // k  # within the level before
            token = tokens.flatten(1).gather(1, kept)
            levels.append((token, log_prob, first + parent, torch.full_like(token, head + 1)))
            first, width = first + width, parent.shape[1]
            if head < len(top_k) - 1:
                state = state.gather(1, parent[:, :, None].expand(-1, -1, state.shape[-1]))
        tokens, log_probs, parents, depths = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        # Stable: of equals, the one that comes first is taken, and a parent comes before its children.
        chosen = log_probs.sort(dim=1, descending=True, stable=True).indices[:, :n_nodes].sort(dim=1).values
        number = torch.zeros_like(parents[:, :1]).repeat(1, parents.shape[1] + 1)  # of every node, 0 is the root
        number.scatter_(1, chosen + 1, torch.arange(1, n_nodes + 1, device=chosen.device).expand_as(chosen))
        return tokens.gather(1, chosen), number.gather(1, parents.gather(1, chosen)), depths.gather(1, chosen)


def mean_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the labels that are not -100 (0 where none is): (..., vocab), (...) -> scalar, in float32."""
    loss = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="sum", ignore_index=-100)
    return loss / (labels != -100).sum().clamp(min=1)


__all__ = ["MLPSpeculatorPreTrainedModel"]
