"""Drafters in the forms of other programs: read, and drafting what their own equations say."""

import json
from functools import partial
from pathlib import Path

import commands
import pytest
import torch
from safetensors.torch import save_file
from test_conversation import tokens
from tiny_models import VOCAB, character_tokenizer, prompts, tiny_model
from torch.nn import functional as F
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from modeling_speculator.context_vectors import read_text
from modeling_speculator.loading import load_speculator
from modeling_speculator.modeling_eagle import EagleSpeculator
from modeling_speculator.published_drafters import find_published


RECIPES = Path(__file__).parents[1] / "recipes"
WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER, DRAFTED = 32, 4, 2, 10, 40, 24
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def base_of(n_layers: int):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=n_layers, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def base():
    return base_of(8)


def eagle3_files(folder, form="midlayer", width=WIDTH, base_width=WIDTH, embeds=False, drafted=DRAFTED, **config):
    """Writes a random EAGLE-3 checkpoint, as SafeAILab's or as vLLM's `speculators` write it; its weights."""
    torch.manual_seed(1)
    layer = "midlayer" if form == "midlayer" else "layers.0"
    shapes = {
        f"{layer}.self_attn.q_proj": (HEADS * HEAD_DIM, 2 * width),
        f"{layer}.self_attn.k_proj": (KV_HEADS * HEAD_DIM, 2 * width),
        f"{layer}.self_attn.v_proj": (KV_HEADS * HEAD_DIM, 2 * width),
        f"{layer}.self_attn.o_proj": (width, HEADS * HEAD_DIM),
        f"{layer}.mlp.gate_proj": (INNER, width),
        f"{layer}.mlp.up_proj": (INNER, width),
        f"{layer}.mlp.down_proj": (width, INNER),
        "fc": (width, 3 * base_width),
        "lm_head": (drafted, width),
    }
    if embeds or width != base_width:
        shapes["embed_tokens"] = (VOCAB, width)
    weights = {f"{name}.weight": 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    for name in (f"{layer}.hidden_norm", f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "norm"):
        weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(width)
    if config.get("norm_before_fc"):
        weights["input_norm.weight"] = 1 + 0.1 * torch.randn(3 * base_width)
    if config.get("fc_norm"):
        weights |= {f"fc_norm.{at}.weight": 1 + 0.1 * torch.randn(base_width) for at in range(3)}
    if drafted < VOCAB:
        ids = torch.randperm(VOCAB)[:drafted].sort().values
        weights["d2t"], weights["t2d"] = ids - torch.arange(drafted), torch.zeros(VOCAB, dtype=torch.bool)
        weights["t2d"][ids] = True
    sizes = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
    }
    own = {name: config.pop(name) for name in ("rope_theta", "rope_scaling") if name in config}
    if form == "midlayer":
        raw = sizes | own | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": drafted} | config
    else:
        raw = {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "draft_vocab_size": drafted}
        raw |= {"transformer_layer_config": sizes | own, **config}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if form == "midlayer":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    return {key.replace("layers.0.", "").replace("midlayer.", ""): weight for key, weight in weights.items()}, raw


def logits_by_hand(weights, raw, base, text, layers, n, n_heads=3):
    """What an EAGLE-3 head says after the first `n` pairs of a text, and then after what it has guessed itself fed
    back with the true tokens: (n_heads, batch, drafted), pair after pair, in plain attention."""
    layer = raw.get("transformer_layer_config", raw)
    config = LlamaConfig(**{key: layer[key] for key in layer if key not in ("model_type", "architectures")})
    norms = {}
    for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm", "norm", "input_norm"):
        if f"{name}.weight" in weights:
            norms[name] = LlamaRMSNorm(len(weights[f"{name}.weight"]), eps=config.rms_norm_eps)
            norms[name].weight.data = weights[f"{name}.weight"]

    def product(x, name):
        return F.linear(x, weights[f"{name}.weight"])

    with torch.no_grad():
        states = base(text, output_hidden_states=True).hidden_states
        features = [states[at][:, :n] for at in layers]
        if raw.get("fc_norm"):
            parts = []
            for at, part in enumerate(features):
                norm = LlamaRMSNorm(part.shape[-1], eps=config.rms_norm_eps)
                norm.weight.data = weights[f"fc_norm.{at}.weight"]
                parts.append(norm(part))
            features = parts
        read = torch.cat(features, dim=-1)
        true = product(norms["input_norm"](read) if "input_norm" in norms else read, "fc")
        table = weights.get("embed_tokens.weight", base.get_input_embeddings().weight)
        fed, answers = true, []
        for head in range(n_heads):
            length = n + head
            tokens_read = norms["input_layernorm"](F.embedding(text[:, 1 : 1 + length], table))
            normed = norms["hidden_norm"](fed)
            pair = torch.cat([tokens_read, normed], dim=-1)
            cos, sin = LlamaRotaryEmbedding(config)(pair, torch.arange(length)[None])

            read = (product(pair, f"self_attn.{name}_proj") for name in "qkv")
            query, key, value = (x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for x in read)
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
            mask = torch.full((length, length), -torch.inf).triu(1)
            weights_of = (query @ key.transpose(-1, -2) * HEAD_DIM**-0.5 + mask).softmax(-1)
            attended = product((weights_of @ value).transpose(1, 2).flatten(2), "self_attn.o_proj")
            out = attended + (normed if raw.get("norm_before_residual") else fed)
            mlp = norms["post_attention_layernorm"](out)
            out = out + product(F.silu(product(mlp, "mlp.gate_proj")) * product(mlp, "mlp.up_proj"), "mlp.down_proj")
            answers.append(product(norms["norm"](out[:, -1]), "lm_head"))
            back = norms["norm"](out) if raw.get("norm_output") else out
            fed = torch.cat([fed, back[:, -1:]], dim=1)
    return torch.stack(answers)


VARIANTS = {
    "SafeAILab's": {},
    "Llama 3.1's angles": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "speculators": {"form": "layers", "norm_before_residual": True, "embeds": True},
    "speculators, narrow": {"form": "layers", "width": 24, "norm_before_residual": False, "target_hidden_size": WIDTH},
    "EAGLE-3.1": {"form": "layers", "norm_before_fc": True, "norm_output": True, "norm_before_residual": True},
    "a norm each": {"form": "layers", "fc_norm": True},
    "the whole vocabulary": {"drafted": VOCAB},
    "nulls": {"speculators_config": None, "eagle_config": None},
    "layers named": {"form": "layers", "eagle_aux_hidden_state_layer_ids": [1, 3, 6]},
    "layers named by SGLang": {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 4, 4]}},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_eagle_3_by_hand(base, tmp_path, variant):
    weights, raw = eagle3_files(tmp_path / "eagle3", **VARIANTS[variant])
    speculator = load_speculator(str(tmp_path / "eagle3"), base)
    layers = {"layers named": [1, 3, 6], "layers named by SGLang": [2, 5, 5]}.get(variant, [2, 4, 5])
    assert speculator.config.feature_layers == layers
    drafter, text = speculator.beside(base), tokens(14, rows=2)
    cell = drafter.speculator
    reading = read_text(base, text[:, :-1], torch.ones_like(text[:, :-1]), layers)
    n = 9
    starts = drafter.with_context(reading.hidden_states[:, :n], text[:, 1 : n + 1], reading.features[:, :n])
    state, tokens_in = cell.first_state(starts[:, -1:]), text[:, n : n + 3]
    expected = logits_by_hand(weights, raw, base, text, layers, n)
    ids = torch.arange(VOCAB) if "d2t" not in weights else weights["d2t"] + torch.arange(DRAFTED)
    for head in range(3):
        state = cell.advance(head, state, tokens_in[:, head : head + 1])
        logits, found = cell.draft_logits(head, cell.features(state), None)
        torch.testing.assert_close(logits[:, 0], expected[head], rtol=1e-4, atol=1e-4)
        if found is not None:
            assert found.tolist() == ids.tolist()
    scores = drafter.score(starts, text[:, 1:])[0, :, -1]
    torch.testing.assert_close(scores[:, ids], expected[0], rtol=1e-4, atol=1e-4)
    assert scores.isneginf().sum() == len(text) * (VOCAB - len(ids))


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_drafts_and_is_saved_as_ours(base, tmp_path, variant):
    eagle3_files(tmp_path / "eagle3", **VARIANTS[variant])
    speculator, inputs = load_speculator(str(tmp_path / "eagle3"), base), prompts()
    plain = base.generate(**inputs, max_new_tokens=20, do_sample=False)
    ours = base.generate(**inputs, max_new_tokens=20, do_sample=False, assistant_model=speculator)
    assert ours.tolist() == plain.tolist()
    speculator.save_pretrained(tmp_path / "ours")
    again = AutoModel.from_pretrained(tmp_path / "ours")
    assert isinstance(again, EagleSpeculator)
    for key, weight in speculator.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight), key
    half = speculator.to(torch.bfloat16).float()  # angles are not rounded with the weights
    if half.config.own_rope:
        assert torch.equal(half.speculator.layer.rope_bits, again.speculator.layer.rope_bits)


@torch.no_grad()
def test_it_is_never_asked_for_more_than_it_scores(base, tmp_path):
    eagle3_files(tmp_path / "eagle3", drafted=5)
    speculator = load_speculator(str(tmp_path / "eagle3"), base)
    speculator.config.top_k_tokens_per_head = [6, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="between 1 and the vocabulary's 5"):
        base.generate(**prompts(), assistant_model=speculator)
    speculator.config.top_k_tokens_per_head, speculator.config.draft_vocabulary = [5, 1, 1, 1, 1], None
    with pytest.raises(ValueError, match="no dial of a drafter with an LM head of its own"):
        base.generate(**prompts(), assistant_model=speculator)
    with pytest.raises(ValueError, match="which stay as they are"):
        speculator.resize_token_embeddings(VOCAB + 8)


def test_of_a_small_model_layers_repeat(tmp_path):
    """2, L // 2 and L - 3 of five layers are all the same."""
    small = base_of(5)
    weights, raw = eagle3_files(tmp_path / "eagle3")
    speculator = load_speculator(str(tmp_path / "eagle3"), small)
    assert speculator.config.feature_layers == [2, 2, 2]
    inputs = prompts()
    plain = small.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert small.generate(**inputs, max_new_tokens=12, assistant_model=speculator).tolist() == plain.tolist()


def test_bad_checkpoints(base, tmp_path):
    folder = tmp_path / "eagle3"
    outside = {"d2t": lambda offsets: offsets + VOCAB}
    twice = {"d2t": lambda offsets: torch.where(torch.arange(DRAFTED) == 1, offsets[0] - 1, offsets)}
    cases = [
        (outside, "does not map"),
        (twice, "does not map"),
        ({"d2t": lambda offsets: offsets[:-1]}, "maps a draft vocabulary of 23 tokens"),
        ({"d2t": None}, "does not say which: it has no `d2t`"),
        ({"fc.weight": None}, "no whole EAGLE-3 checkpoint"),
        ({"norm.weight": None}, "don't fit its config.json"),
        ({"layers.1.mlp.gate_proj.weight": lambda _: torch.zeros(INNER, WIDTH)}, "of one Llama layer has not"),
        ({"midlayer.self_attn.q_norm.weight": lambda _: torch.ones(HEAD_DIM)}, "this variant is not supported"),
        ({"fc.weight": lambda _: torch.zeros(WIDTH, 3 * 48)}, "it is for another one"),
    ]
    for changes, said in cases:
        eagle3_files(folder)
        weights = torch.load(folder / "pytorch_model.bin")
        for key, change in changes.items():
            if change is None:
                del weights[key]
            else:
                weights[key] = change(weights.get(key))
        torch.save(weights, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=said):
            load_speculator(str(folder), base)
    eagle3_files(folder, hidden_act="gelu")
    with pytest.raises(ValueError, match="only SiLU is known"):
        load_speculator(str(folder), base)
    eagle3_files(folder, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ValueError, match="change with the text's length"):
        load_speculator(str(folder), base)


@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_eagle_1(base, tmp_path, biased):
    """Its config is that of a Llama of one layer; the weights say what it is."""
    torch.manual_seed(2)
    shapes = {f"layers.0.self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qo"}
    shapes |= {f"layers.0.self_attn.{name}_proj": (WIDTH // 2, WIDTH) for name in "kv"}
    shapes |= {f"layers.0.mlp.{name}_proj": (INNER, WIDTH) for name in ("gate", "up")}
    shapes |= {"layers.0.mlp.down_proj": (WIDTH, INNER), "fc": (WIDTH, 2 * WIDTH)}
    weights = {f"{name}.weight": 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    weights["layers.0.post_attention_layernorm.weight"] = torch.ones(WIDTH)
    weights["embed_tokens.weight"] = base.get_input_embeddings().weight.clone()
    biases = {"fc.bias": WIDTH}
    if biased:
        sizes = {"q": WIDTH, "k": WIDTH // 2, "v": WIDTH // 2}
        biases |= {f"layers.0.self_attn.{name}_proj.bias": size for name, size in sizes.items()}
    weights |= {name: torch.randn(size) for name, size in biases.items()}
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": 1}
    raw |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": INNER, "vocab_size": VOCAB}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": 1e-6}))
    save_file(weights, tmp_path / "model.safetensors")
    speculator = load_speculator(str(tmp_path), base)
    layer = speculator.speculator.layer
    assert find_published(str(tmp_path)).form == "EAGLE"
    assert layer.fc.bias is not None and (layer.q_proj.bias is not None) == biased
    states, text = torch.randn(2, 7, WIDTH), tokens(7, rows=2)
    sizes = {key: raw[key] for key in raw if key not in ("architectures", "model_type")}
    config = LlamaConfig(**sizes, attention_bias=biased, attn_implementation="eager")
    theirs = LlamaDecoderLayer(config, 0)
    theirs.input_layernorm = torch.nn.Identity()
    own = {key.removeprefix("layers.0."): weight for key, weight in weights.items() if key.startswith("layers.0.")}
    theirs.load_state_dict(own | ({"self_attn.o_proj.bias": torch.zeros(WIDTH)} if biased else {}))
    embedded = F.embedding(text, weights["embed_tokens.weight"])
    entering = F.linear(torch.cat([embedded, states], -1), weights["fc.weight"], weights["fc.bias"])
    angles = LlamaRotaryEmbedding(config)(entering, torch.arange(7)[None])
    mask = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    expected = theirs(entering, attention_mask=mask, position_embeddings=angles)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(speculator.beside(base).with_context(states, text), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["FasterDecoding", "vLLM"])
@torch.no_grad()
def test_medusa(base, tmp_path, form):
    torch.manual_seed(3)
    blocks, heads = ([0.3 * torch.randn(*shape) for _ in range(2)] for shape in ((WIDTH, WIDTH), (VOCAB, WIDTH)))
    biases = [torch.randn(WIDTH) for _ in range(2)]
    if form == "FasterDecoding":
        weights = {}
        for at in range(2):
            weights |= {f"{at}.0.linear.weight": blocks[at], f"{at}.0.linear.bias": biases[at]}
            weights[f"{at}.1.weight"] = heads[at]
        raw = {"medusa_num_heads": 5, "medusa_num_layers": 1, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
        torch.save(weights, tmp_path / "medusa_lm_head.pt")
    else:
        biases = [torch.zeros(WIDTH) for _ in range(2)]
        weights = {f"blocks.{at}.layers.0.weight": blocks[at] for at in range(2)}
        weights |= {f"lm_heads.{at}.weight": heads[at] for at in range(2)}
        raw = {"model_type": "medusa", "architectures": ["MedusaModel"], "num_heads": 2, "hidden_size": WIDTH}
        save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    speculator, inputs = load_speculator(str(tmp_path), base), prompts()
    state = torch.randn(1, 1, WIDTH)
    logits = speculator(state, tokens(2)).logits
    for at in range(2):
        expected = F.linear(state + F.silu(F.linear(state, blocks[at], biases[at])), heads[at])
        torch.testing.assert_close(logits[at], expected)
    plain = base.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert base.generate(**inputs, max_new_tokens=12, assistant_model=speculator).tolist() == plain.tolist()


def test_hydra_is_refused(base, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hydra_num_heads": 4, "hydra_num_layers": 1}))
    with pytest.raises(ValueError, match="train new ones, `method: hydra`"):
        load_speculator(str(tmp_path), base)


def test_other_models_are_none(tmp_path):
    tiny_model("llama", one_layer_of_each_kind=True).save_pretrained(tmp_path / "llama")
    assert find_published(str(tmp_path / "llama")) is None
    assert find_published(str(tmp_path)) is None


def test_converted_it_is_one_of_ours(base, tmp_path):
    """And can be trained on, which it cannot as it was."""
    base.save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    eagle3_files(tmp_path / "eagle3", **VARIANTS["EAGLE-3.1"])
    convert = partial(commands.run, RECIPES / "convert.py", "--speculator")
    form = ("--to", "modeling_speculator", "--output", tmp_path / "ours")
    done = convert(tmp_path / "eagle3", *form)
    assert done.stderr.splitlines()[-1].endswith("does not say which base model it is for: give --base_model.")
    done = convert(tmp_path / "eagle3", "--to", "arctic", "--output", tmp_path / "ours")
    assert "is for what other programs publish" in done.stderr
    done = convert(tmp_path / "eagle3", *form, "--base_model", tmp_path / "base")
    assert done.returncode == 0, done.stderr
    ours = AutoModel.from_pretrained(tmp_path / "ours").state_dict()
    for key, weight in load_speculator(str(tmp_path / "eagle3"), base).state_dict().items():
        assert torch.equal(ours[key], weight), key
    done = convert(tmp_path / "ours", "--to", "modeling_speculator", "--output", tmp_path / "again")
    assert done.returncode != 0
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": "ab cd ef" * 20}) + "\n" for _ in range(40)))
    train = partial(commands.run, RECIPES / "train_speculator.py", "--base_model", tmp_path / "base")
    flags = ("--data_files", tmp_path / "texts.jsonl", "--validation_fraction", 0, "--sequence_length", 24)
    flags += ("--max_steps", 2, "--per_device_train_batch_size", 2, "--report_to", "none")
    done = train(*flags, "--speculator", tmp_path / "eagle3", "--output_dir", tmp_path / "trained")
    assert "no speculator" in done.stderr and "--to modeling_speculator" in done.stderr
    done = train(*flags, "--speculator", tmp_path / "ours", "--output_dir", tmp_path / "trained")
    assert done.returncode == 0, done.stderr
    trained = AutoModel.from_pretrained(tmp_path / "trained").state_dict()
    assert not torch.equal(trained["speculator.own_head.weight"], ours["speculator.own_head.weight"])
    assert torch.equal(trained["speculator.own_ids"], ours["speculator.own_ids"])
