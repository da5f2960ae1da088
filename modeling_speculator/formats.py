"""Forms of config and weights that speculators are published in, besides our own: Snowflake's Arctic speculators.

Sources: ArcticTraining (which writes them) and Arctic Inference (which serves them), as of 2025.
"""

import json
from pathlib import Path

from safetensors.torch import save_file


ARCTIC_MLP, ARCTIC_LSTM = "ArcticMLPSpeculatorPreTrainedModel", "ArcticLSTMSpeculatorPreTrainedModel"
_ARCTIC = {ARCTIC_MLP, ARCTIC_LSTM, "MLPVariantSpeculatorPreTrainedModel"}
_MISSPELT = "top_k_tokesns_per_head"  # as ArcticTraining writes it

# Names of weights (the prefix `speculator.`, which Arctic's have not, is transformers' to add): layers that Arctic's
# second class keeps in a Sequential each.
KEY_MAPPING = {rf"\b{name}\.(\d+)\.0\.": rf"{name}.\1." for name in ("emb", "proj", "ln")}
# The gated cell's embedding, which Arctic's files hold four times.
REPEATED_KEYS = [r"(input|cell|output)_emb\.0\.weight$"]


def read_config(config: dict) -> dict:
    """A config.json of any known form -> the keys of `MLPSpeculatorConfig`.

    Raises:
        ValueError: for a speculator with more layers than this package has.
    """
    config = dict(config)
    if isinstance(config.get("architectures"), str):
        config["architectures"] = [config["architectures"]]
    if not (_ARCTIC.intersection(config.get("architectures") or []) or _MISSPELT in config):
        return config
    if "input_hidden_dim" in config:
        widths = {name: str(config.pop(name)) for name in ("emb_dim", "proj_dim", "inner_dim")}
        if len(set(widths.values())) > 1 or not widths["inner_dim"].isdecimal():
            raise ValueError(
                f"This speculator has embeddings, projections or states of several layers or widths ({widths}), which "
                "is not supported: only such as are equal numbers are."
            )
        config |= {"emb_dim": config.pop("input_hidden_dim"), "inner_dim": int(widths["inner_dim"])}
    if not config.pop("tie_lstm_embs", config.get("method") != "sum_lstm") and config.get("method") == "sum_lstm":
        raise ValueError("A gated speculator with an embedding for each gate (`tie_lstm_embs` off) is not supported.")
    top_k = config.pop(_MISSPELT, [1] * config.get("n_predict", 3))
    config.setdefault("top_k_tokens_per_head", top_k)
    if max(config["top_k_tokens_per_head"]) == 1:  # a chain, where Arctic's `n_candidates` repeats `n_predict`
        config["n_candidates"] = 1
    config["architectures"] = ["MLPSpeculatorPreTrainedModel"]
    return config


def save_arctic(speculator, folder: str | Path, base_model_archs: list[str]) -> None:
    """Writes a speculator in the form that Arctic Inference serves: config.json and model.safetensors.

    Args:
        base_model_archs: classes of base models that it may be served beside, `["LlamaForCausalLM"]`; Arctic
            Inference compares them with what it runs.

    Raises:
        ValueError: for a speculator that has no such form.
    """
    config = speculator.config
    if config.method not in ("sum_rnn", "sum_lstm"):
        raise ValueError(f"Arctic Inference serves MLP speculators, not {config.method!r}.")
    if config.tie_weights and config.n_predict == 1:
        raise ValueError("Arctic Inference does not serve one head with `tie_weights`: they are tied to nothing.")
    theirs = config.to_diff_dict() | {"base_model_archs": base_model_archs, "architectures": [ARCTIC_MLP]}
    theirs |= {name: getattr(config, name) for name in ("tie_weights", "scale_input", "n_candidates", "inner_dim")}
    theirs["torch_dtype"] = theirs.pop("dtype", str(speculator.dtype).removeprefix("torch."))
    tied = speculator.all_tied_weights_keys
    weights = {key: tensor for key, tensor in speculator.state_dict().items() if key not in tied}
    if config.method == "sum_lstm":
        width = str(config.inner_dim or config.emb_dim)
        theirs |= {"architectures": [ARCTIC_LSTM], "tie_lstm_embs": True, "input_hidden_dim": config.emb_dim}
        theirs |= {"emb_dim": width, "proj_dim": width, "inner_dim": width}
        weights = {key.removeprefix("speculator."): tensor for key, tensor in weights.items()}
        for gate in ("input", "cell", "output"):
            weights[f"{gate}_emb.0.weight"] = weights["forget_emb.0.weight"].clone()
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    (Path(folder) / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
