"""Drafters in the forms that other programs publish them in, as this package's models: EAGLE, EAGLE-3 and Medusa.

Sources of the forms: SafeAILab/EAGLE, vLLM's `speculators`, SGLang (SpecForge), FasterDecoding/Medusa, as of 2026.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import CONFIG_NAME

from .modeling_eagle import EagleConfig, EagleSpeculator
from .modeling_medusa import MedusaConfig, MedusaModel


# Heads, where a checkpoint does not say how many tokens it drafts: an EAGLE layer drafts any number.
EAGLE_HEADS = 5

_LAYER_PARTS = {
    **{f"self_attn.{name}_proj": f"{name}_proj" for name in "qkvo"},
    **{f"mlp.{name}_proj": f"{name}_proj" for name in ("gate", "up", "down")},
    **{name: name for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")},
}
_AROUND_LAYER = ("fc", "norm", "input_norm", *(f"fc_norm.{at}" for at in range(8)))
_FLAGS = {"norm_before_fc": "fc", "fc_norm": "features", "norm_before_residual": "residual", "norm_output": "feedback"}
# What our model has no use for: `d2t` says the same, and the others are the base model's.
_UNUSED = ("t2d", "verifier_lm_head.weight", "verifier_norm.weight")


@dataclass(frozen=True)
class PublishedDrafter:
    """A checkpoint of another program.

    Attributes:
        name, revision: folder or Hub id, and version there.
        form: "EAGLE-3", "EAGLE", "Medusa" or "Hydra".
        config: its config.json.
    """

    name: str
    revision: str | None
    form: str
    config: dict

    @property
    def base_model_name(self) -> str | None:
        """The base model that it was trained for, if it says so."""
        verifier = (self.config.get("speculators_config") or {}).get("verifier") or {}
        return verifier.get("name_or_path") or self.config.get("base_model_name_or_path")

    def beside(
        self, base_model: PreTrainedModel, n_predict: int | None = None, feature_layers: Sequence[int] | None = None
    ) -> PreTrainedModel:
        """It as a speculator for a base model, in float32 on the CPU.

        Args:
            n_predict: heads; by default as many tokens as it says it drafts, or 5. Medusa's are as many as it has.
            feature_layers: of EAGLE-3, layers of the base model, counted from 0, what enters which it reads; by
                default those that its config names, else 2, L // 2 and L - 3.

        Raises:
            ValueError: where it is no such checkpoint as it says, or none for this base model.
        """
        if self.form == "Hydra":
            raise ValueError(
                f"{self.name} holds Hydra heads in their published form, whose blocks share weights and whose LM "
                "heads have biases, which the heads here don't: train new ones, `method: hydra`."
            )
        weights = read_weights(self.name, self.revision)
        text = base_model.config.get_text_config(decoder=True)
        make = _medusa if self.form == "Medusa" else _eagle
        try:
            speculator = make(self, weights, text, n_predict, feature_layers)
        except KeyError as error:
            raise ValueError(f"{self.name} is no whole {self.form} checkpoint: it has no {error.args[0]!r}.") from None
        speculator.config.base_model_name_or_path = self.base_model_name or base_model.config.name_or_path or None
        if self.form != "Medusa":
            speculator.speculator.start_from(base_model)
        return speculator.eval()


def find_published(name: str, revision: str | None = None) -> PublishedDrafter | None:
    """A checkpoint of another program's drafter, if it is one.

    Args:
        name: folder or Hub id.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except OSError:
        return None
    form = _form_of(config)
    if form is None and config.get("model_type") == "llama" and config.get("num_hidden_layers") == 1:
        form = "EAGLE" if "fc.weight" in read_weights(name, revision) else None  # whose config says nothing else
    return form and PublishedDrafter(name, revision, form, config)


def _form_of(config: dict) -> str | None:
    architectures = " ".join(config.get("architectures") or ()).lower()
    kind = config.get("speculators_model_type")
    if kind == "eagle3" or "eagle3" in architectures:
        return "EAGLE-3"
    if kind == "eagle" or "eagle" in architectures and config.get("model_type") in ("llama", "eagle", None):
        return "EAGLE"
    if "medusa_num_heads" in config or config.get("model_type") == "medusa":
        return "Medusa"
    if "hydra_num_heads" in config:
        return "Hydra"
    is_llama = config.get("model_type") == "llama" and config.get("num_hidden_layers") == 1
    return "EAGLE-3" if is_llama and "draft_vocab_size" in config else None


def read_weights(name: str, revision: str | None = None) -> dict[str, torch.Tensor]:
    """All weights of a folder or a repository on the Hub, in whichever files.

    Raises:
        ValueError: if there are none.
    """
    folder = Path(name)
    if not folder.is_dir():
        patterns = [CONFIG_NAME, "*.safetensors", "*.bin", "*.pt"]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    for pattern, read in (("*.safetensors", load_file), ("*.bin", _load), ("*_lm_head.pt", _load)):
        if files := sorted(folder.glob(pattern)):
            return {key.removeprefix("model."): weight for file in files for key, weight in read(file).items()}
    raise ValueError(f"{name} holds no weights (*.safetensors, *.bin, *_lm_head.pt).")


def _load(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True)


# EAGLE


def _eagle(published: PublishedDrafter, weights: dict, text: PreTrainedConfig, n_predict, feature_layers):
    name, form, raw = published.name, published.form, published.config
    layer = raw.get("transformer_layer_config", raw)
    found = _named_as_ours(published, weights)
    shapes = {key: tuple(weight.shape) for key, weight in found.items()}
    width, heads = shapes["layer.o_proj.weight"][0], layer["num_attention_heads"]
    head_dim = layer.get("head_dim") or shapes["layer.q_proj.weight"][0] // heads
    is_fused = form == "EAGLE-3"
    if is_fused:
        feature_layers = _feature_layers(raw, text.num_hidden_layers) if feature_layers is None else feature_layers
        features = shapes["layer.fc.weight"][1]
        if features != len(feature_layers) * text.hidden_size:
            raise ValueError(
                f"{name} reads {features:,} numbers of a token, but {len(feature_layers)} layers of this base model "
                f"have {len(feature_layers) * text.hidden_size:,}: it is for another one, or other `feature_layers`."
            )
    elif width != text.hidden_size:
        raise ValueError(f"{name} is {width} wide, and the base model {text.hidden_size}: it is for another one.")
    if layer.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{name} has `hidden_act={layer['hidden_act']!r}`; only SiLU is known.")
    ids = _draft_ids(published, found, layer.get("vocab_size") or text.vocab_size)
    rope = _rope(published, layer, head_dim)
    config = EagleConfig(
        vocab_size=layer.get("vocab_size") or text.vocab_size,
        emb_dim=text.hidden_size,
        n_predict=n_predict or _tokens_drafted(raw) or EAGLE_HEADS,
        inner_dim=shapes["layer.gate_proj.weight"][0],
        context_heads=heads,
        context_kv_heads=shapes["layer.k_proj.weight"][0] // head_dim,
        context_head_dim=head_dim,
        layer_dim=0 if width == text.hidden_size else width,
        rms_norm_eps=layer.get("rms_norm_eps", 1e-6),
        feature_layers=list(feature_layers or ()) if is_fused else [],
        biases=[kind for kind, key in (("fc", "fc"), ("qkv", "q_proj")) if f"layer.{key}.bias" in found],
        extra_norms=[place for flag, place in _FLAGS.items() if _flag(raw, flag)],
        own_embeddings="embed_tokens.weight" in found,
        own_lm_head="own_head.weight" in found,
        draft_vocabulary=ids,
        **({"rope_theta": rope} if isinstance(rope, float) else {"own_rope": True, "rope_scale": rope[1]}),
    )
    speculator = EagleSpeculator(config)
    if not isinstance(rope, float):
        speculator.speculator.layer.keep_rope_speeds(rope[0])
    kept = {key for key in speculator.speculator.state_dict() if "sketch" in key or "rope_bits" in key}
    _load_into(published, speculator.speculator, found, kept)
    return speculator


def _named_as_ours(published: PublishedDrafter, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the names of `EagleCell`; `d2t` as it is."""
    found, unknown = {}, []
    for key, weight in weights.items():
        if key in _UNUSED:
            continue
        part, _, kind = key.rpartition(".")
        in_layer = re.sub(r"^(midlayer|layers\.0)\.", "", part)
        if in_layer != part and in_layer in _LAYER_PARTS:
            found[f"layer.{_LAYER_PARTS[in_layer]}.{kind}"] = weight
        elif part in _AROUND_LAYER:
            found[f"layer.{key}"] = weight
        elif key in ("embed_tokens.weight", "d2t"):
            found[key] = weight
        elif key == "lm_head.weight":
            found["own_head.weight"] = weight
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{published.name} has weights that {published.form} of one Llama layer has not "
            f"({', '.join(sorted(unknown)[:4])}{', ...' if len(unknown) > 4 else ''}): this variant is not supported."
        )
    return found


def _draft_ids(published: PublishedDrafter, found: dict[str, torch.Tensor], vocab_size: int) -> list[int] | None:
    """The ids that the LM head scores, in ascending order; its rows, and `own_ids`, are brought into it."""
    offsets, head = found.pop("d2t", None), found.get("own_head.weight")
    n_drafted = vocab_size if head is None else len(head)
    if offsets is None:
        if n_drafted != vocab_size:
            raise ValueError(
                f"{published.name} scores {n_drafted:,} of {vocab_size:,} tokens, and does not say which: it has no "
                "`d2t`."
            )
        return None
    if head is None or len(offsets) != n_drafted:
        raise ValueError(
            f"{published.name} maps a draft vocabulary of {len(offsets):,} tokens (`d2t`), but its LM head scores "
            f"{'none' if head is None else f'{n_drafted:,}'}."
        )
    ids, order = (torch.arange(len(offsets)) + offsets.long()).sort()
    if int(ids[0]) < 0 or int(ids[-1]) >= vocab_size or len(ids.unique()) != len(ids):
        raise ValueError(
            f"The draft vocabulary of {published.name} does not map: with the offsets in `d2t`, ids must be different "
            f"ones from 0 to {vocab_size - 1:,}."
        )
    found["own_head.weight"], found["own_ids"] = head[order], ids
    return ids.tolist()


def _feature_layers(raw: dict, n_layers: int) -> list[int]:
    """Layers what enters which is read: as a config names them, or EAGLE-3's."""
    if ids := raw.get("eagle_aux_hidden_state_layer_ids"):  # vLLM's count: 0 is the embeddings
        return list(ids)
    if ids := (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids"):  # SGLang's: what layers put out
        return [at + 1 for at in ids]
    return [2, n_layers // 2, n_layers - 3]


def _flag(raw: dict, name: str) -> bool:
    return bool(raw.get(name) or (raw.get("eagle_config") or {}).get(name))


def _tokens_drafted(raw: dict) -> int | None:
    proposals = (raw.get("speculators_config") or {}).get("proposal_methods") or [{}]
    return proposals[0].get("speculative_tokens")


def _rope(published: PublishedDrafter, layer: dict, head_dim: int) -> float | tuple[torch.Tensor, float]:
    """The base of rotary positions, or the angles (head_dim / 2,) of a kind that no base says, and their scale."""
    names = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings")
    given = {name: layer[name] for name in names if layer.get(name) is not None}
    config = LlamaConfig(head_dim=head_dim, **given)
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return float(parameters["rope_theta"])
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"{published.name} has rotary positions of type {kind!r}, which change with the text's length."
        )
    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq, float(rotary.attention_scaling)


# Medusa


def _medusa(published: PublishedDrafter, weights: dict, text: PreTrainedConfig, n_predict, feature_layers):
    found, blocks = {}, 0
    for key, weight in weights.items():
        key = key.removeprefix("medusa_head.")
        if block := re.fullmatch(r"(?:blocks\.)?(\d+)\.(?:layers\.)?(\d+)\.(?:linear\.)?(weight|bias)", key):
            head, at, kind = int(block[1]), int(block[2]), block[3]
            is_block = key.startswith("blocks.") or ".linear." in key
            blocks = max(blocks, at + 1 if is_block else 0)
            found[f"{'proj' if is_block else 'head'}.{head}.{kind}"] = weight
        elif head := re.fullmatch(r"lm_heads\.(\d+)\.weight", key):
            found[f"head.{head[1]}.weight"] = weight
        elif key == "lm_head.weight":  # one for all
            found |= {f"head.{head}.weight": weight for head in range(published.config.get("num_heads", 1))}
        else:
            raise ValueError(f"{published.name} has a weight that Medusa heads have not: {key}.")
    if blocks != 1:
        raise ValueError(f"{published.name} has {blocks} residual blocks a head; only heads of one are supported.")
    vocab_size, width = found["head.0.weight"].shape
    n_heads = sum(key.startswith("head.") for key in found)
    if n_predict not in (None, n_heads):
        raise ValueError(f"{published.name} has {n_heads} heads: `n_predict` can't be {n_predict}.")
    for head in range(n_heads):
        found.setdefault(f"proj.{head}.bias", torch.zeros(width))
    model = MedusaModel(MedusaConfig(vocab_size=vocab_size, emb_dim=width, n_predict=n_heads))
    _load_into(published, model.speculator, found, set())
    return model


def _load_into(published: PublishedDrafter, cell: torch.nn.Module, found: dict, kept: set[str]) -> None:
    """Fills all weights but those that are `kept`.

    Raises:
        ValueError: if one is missing, too many or of another shape.
    """
    wanted = {key: tuple(weight.shape) for key, weight in cell.state_dict().items() if key not in kept}
    given = {key: tuple(weight.shape) for key, weight in found.items()}
    wrong = sorted(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key))
    if wrong:
        said = "; ".join(f"{key}: {given.get(key, 'missing')}, not {wanted.get(key, 'one')}" for key in wrong[:4])
        raise ValueError(f"The weights of {published.name} don't fit its config.json ({said}).")
    cell.load_state_dict(found, strict=False)


__all__ = ["PublishedDrafter", "find_published"]
