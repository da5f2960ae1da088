"""The speculator itself: published numbers, published files, and one recurrence for training and drafting."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel


SHAPES = {
    "untied": {},
    "tied": {"tie_weights": True},
    "scaled": {"scale_input": True},
    "no inner_dim": {"inner_dim": 0},
    "one head": {"n_predict": 1, "tie_weights": True},
    "seven heads": {"n_predict": 7, "n_candidates": 9},
    "gated": {"method": "sum_lstm", "tie_weights": True},
    "one gated head": {"method": "sum_lstm", "tie_weights": True, "n_predict": 1},
}


def speculator(seed=0, **config) -> MLPSpeculatorPreTrainedModel:
    torch.manual_seed(seed)
    config = {"vocab_size": 50, "emb_dim": 16, "inner_dim": 24, "n_predict": 3} | config
    model = MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # norms too
    return model


@pytest.mark.parametrize("case", ["llama7b_like", "granite20b_like"])
def test_golden_vectors_of_the_published_implementation(shared, case):
    golden = json.loads((shared / "reference/golden.json").read_text())[case]
    tensors = load_file(shared / f"reference/{case}.safetensors")
    config = MLPSpeculatorConfig(**golden["config"], top_k_tokens_per_head=golden["topk"], n_candidates=golden["n"])
    model = MLPSpeculatorPreTrainedModel(config)
    model.load_state_dict({key.replace("w.", "speculator.", 1): t for key, t in tensors.items() if key[:2] == "w."})
    logits = model(tensors["in.state"], tensors["in.inds"]).logits
    torch.testing.assert_close(logits, tensors["out.forward"], atol=1e-4, rtol=0)
    candidates = model.generate_candidates(tensors["in.gen_state"], tensors["in.gen_ind"])
    assert candidates.tolist() == tensors["out.suffixes"].tolist()
    chain = model.generate_candidates(tensors["in.gen_state"], tensors["in.gen_ind"], [1] * config.n_predict, 1)
    assert chain.tolist() == golden["greedy"]


def test_golden_vectors_of_the_gated_cell(shared):
    golden = json.loads((shared / "reference/golden.json").read_text())["arctic_lstm_like"]
    tensors = load_file(shared / "reference/arctic_lstm_like.safetensors")
    theirs = golden["config"]
    model = MLPSpeculatorPreTrainedModel(
        MLPSpeculatorConfig(
            method=theirs["method"],
            emb_dim=theirs["input_hidden_dim"],
            inner_dim=int(theirs["inner_dim"]),
            top_k_tokens_per_head=golden["topk"],
            n_candidates=golden["n"],
            **{key: theirs[key] for key in ("vocab_size", "n_predict", "tie_weights", "scale_input")},
        )
    )
    weights = {key.replace("w.", "speculator.", 1): t for key, t in tensors.items() if key[:2] == "w."}
    weights |= {f"speculator.head.{head}.weight": tensors["w.head.0.weight"] for head in (1, 2)}
    model.load_state_dict(weights)
    logits = model(tensors["in.state"], tensors["in.inds"]).logits
    torch.testing.assert_close(logits, tensors["out.forward"], atol=1e-4, rtol=0)
    candidates = model.generate_candidates(tensors["in.gen_state"], tensors["in.gen_ind"])
    assert candidates.tolist() == tensors["out.suffixes"].tolist()


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_parallel_forward_is_step_by_step_drafting(shape):
    """Each path of an exhaustive draft has the log-prob that the training forward gives it."""
    model = speculator(vocab_size=5, **({"n_predict": 3} | SHAPES[shape] | {"n_candidates": 1}))
    n_predict = model.config.n_predict
    top_k = [3] * min(n_predict, 3) + [1] * (n_predict - 3)
    hidden_states, root = torch.randn(2, 1, 16), torch.tensor([[1], [4]])
    n_leaves = 3 ** min(n_predict, 3)
    candidates = model.generate_candidates(hidden_states, root, top_k, n_leaves)
    for row in range(2):
        expected = []
        paths = [[]]
        for head, k in enumerate(top_k):  # the tree by the training forward, one path at a time
            grown = []
            for path in paths:
                input_ids = torch.tensor([[int(root[row]), *path, *[0] * (n_predict - len(path) - 1)]])
                log_probs = model(hidden_states[row : row + 1], input_ids).logits[head, 0, 0].log_softmax(-1)
                grown += [[*path, token] for token in log_probs.topk(k).indices.tolist()]
            paths = grown
        for path in paths:
            input_ids = torch.tensor([[int(root[row]), *path[:-1]]])
            logits = model(hidden_states[row : row + 1], input_ids).logits[:, 0, 0].log_softmax(-1)
            expected.append((float(logits[range(n_predict), path].sum()), path))
        best_first = [path for _, path in sorted(expected, reverse=True)]
        assert candidates[row].tolist() == best_first


@pytest.mark.parametrize("n_tree_nodes", [1, 2, 7, 15, 50])
@torch.no_grad()
def test_the_best_nodes_of_the_tree(n_tree_nodes):
    """Against all nodes, each with the log-prob that the training forward gives its path."""
    model = speculator()
    model.config.n_tree_nodes = n_tree_nodes
    hidden_states, root = torch.randn(2, 1, 16), torch.tensor([[1], [4]])
    tokens, parents, depths = model.generate_tree(hidden_states, root)
    assert tokens.shape == parents.shape == depths.shape == (2, n_tree_nodes)
    for row in range(2):
        paths, every = [()], {}
        for head, k in enumerate(model.config.top_k_tokens_per_head):
            grown = []
            for path in paths:
                input_ids = torch.tensor([[int(root[row]), *path, *[0] * (2 - len(path))]])
                log_probs = model(hidden_states[row : row + 1], input_ids).logits[head, 0, 0].log_softmax(-1)
                for token in log_probs.topk(k).indices.tolist():
                    every[(*path, token)] = every.get(path, 0.0) + float(log_probs[token])
                    grown.append((*path, token))
            paths = grown
        best = sorted(every, key=every.get, reverse=True)[:n_tree_nodes]
        drafted = [()]
        for node, (token, parent) in enumerate(zip(tokens[row].tolist(), parents[row].tolist(), strict=True)):
            drafted.append((*drafted[parent], token))
            assert depths[row, node] == len(drafted[-1])
        assert set(drafted[1:]) == set(best)
        assert depths[row].tolist() == sorted(depths[row].tolist())


def test_forward_at_every_position_is_the_forward_at_one():
    model = speculator()
    hidden_states, input_ids = torch.randn(2, 6, 16), torch.randint(50, (2, 9))
    logits = model(hidden_states, input_ids).logits
    assert logits.shape == (3, 2, 6, 50)
    for position in range(6):
        alone = model(hidden_states[:, position : position + 1], input_ids[:, position:]).logits
        torch.testing.assert_close(alone[:, :, 0], logits[:, :, position])


def test_losses_are_the_mean_cross_entropy_of_each_head():
    model = speculator()
    hidden_states, input_ids = torch.randn(2, 4, 16), torch.randint(50, (2, 6))
    labels = torch.randint(50, (2, 6))
    labels[0, 4:] = -100
    out = model(hidden_states, input_ids, labels)
    for head in range(3):
        log_probs = out.logits[head].log_softmax(-1)
        targets = labels[:, head : head + 4]
        picked = [-log_probs[b, p, targets[b, p]] for b in range(2) for p in range(4) if targets[b, p] != -100]
        torch.testing.assert_close(out.losses[head], torch.stack(picked).mean())
    torch.testing.assert_close(out.loss, out.losses.sum())
    assert model(hidden_states, input_ids, torch.full_like(labels, -100)).loss == 0


def test_tied_is_untied_with_equal_weights():
    tied = speculator(tie_weights=True)
    untied = speculator(tie_weights=False)
    untied.load_state_dict(tied.state_dict())
    hidden_states, input_ids = torch.randn(1, 4, 16), torch.randint(50, (1, 6))
    assert torch.equal(tied(hidden_states, input_ids).logits, untied(hidden_states, input_ids).logits)
    # E, d, V, n = 16, 24, 50, 3: 2Vd + Ed + d^2 + 2d and 2nVd + Ed + (n - 1)d^2 + 2nd
    assert tied.num_parameters() == 2 * 50 * 24 + 16 * 24 + 24**2 + 2 * 24
    assert untied.num_parameters() == 2 * 3 * 50 * 24 + 16 * 24 + 2 * 24**2 + 2 * 3 * 24


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_bit_equal(tmp_path, shape, dtype):
    model = speculator(**SHAPES[shape]).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is MLPSpeculatorPreTrainedModel
    assert loaded.dtype == dtype
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_saved_files_have_the_published_keys_and_names(tmp_path):
    speculator(n_predict=2, top_k_tokens_per_head=[5, 3], base_model_name_or_path="org/base").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    published = {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "base_model_name_or_path": "org/base",
        "emb_dim": 16,
        "inner_dim": 24,
        "model_type": "mlp_speculator",
        "n_candidates": 5,
        "n_predict": 2,
        "top_k_tokens_per_head": [5, 3],
        "vocab_size": 50,
    }
    assert published.items() <= config.items()
    assert config.keys() - published.keys() == {"dtype", "transformers_version"}  # nothing that is off or unset
    names = {f"speculator.{name}.{i}.weight" for name in ("emb", "proj", "head", "ln") for i in range(2)}
    assert load_file(tmp_path / "model.safetensors").keys() == names | {"speculator.ln.0.bias", "speculator.ln.1.bias"}


def test_published_config_verbatim(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"base_model_name_or_path":"meta-llama/Llama-2-13b-chat-hf","architectures":["MLPSpeculatorPreTrainedModel"],'
        '"emb_dim":5120,"inner_dim":4096,"model_type":"mlp_speculator","n_candidates":5,"n_predict":3,'
        '"top_k_tokens_per_head":[5,3,2],"torch_dtype":"float16","transformers_version":"4.35.0","vocab_size":32000}'
    )
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.emb_dim, config.inner_dim, config.top_k_tokens_per_head) == (5120, 4096, [5, 3, 2])
    assert config.base_model_name_or_path == "meta-llama/Llama-2-13b-chat-hf"
    with torch.device("meta"):
        assert MLPSpeculatorPreTrainedModel(config).num_parameters() == 840_982_528  # "841.0 M"


@pytest.mark.parametrize("tied", [False, True])
def test_pytorch_bin_with_every_alias(tmp_path, tied):
    model = speculator(tie_weights=tied)
    model.config.architectures = ["MLPSpeculatorPreTrainedModel"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert (loaded.speculator.emb[1].weight is loaded.speculator.emb[0].weight) == tied


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (shutil.rmtree, (str(tmp_path / "victim"),))

    (tmp_path / "victim").mkdir()
    speculator().config.save_pretrained(tmp_path)
    torch.save({"speculator.emb.0.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights.only|unsupported|pickle"):
        AutoModel.from_pretrained(tmp_path)
    assert (tmp_path / "victim").is_dir()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda w: w.pop("speculator.proj.1.weight"), "missing_keys.*proj.1.weight"),
        (lambda w: w.update({"speculator.emb.3.weight": torch.zeros(2)}), "unexpected_keys.*emb.3.weight"),
        (lambda w: w.update({"speculator.ln.0.bias": torch.zeros(7)}), "mismatched_keys.*ln.0.bias"),
    ],
)
def test_checkpoints_are_never_half_loaded(tmp_path, damage, complaint):
    speculator().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    damage(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=complaint):
        AutoModel.from_pretrained(tmp_path)


def test_tied_config_with_weights_that_differ(tmp_path):
    model = speculator()
    model.save_pretrained(tmp_path)
    model.config.tie_weights = True
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ties, yet differ"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"n_predict": 0}, "n_predict.*at least 1"),
        ({"n_predict": "3"}, "n_predict.*integer"),
        ({"n_predict": 2, "top_k_tokens_per_head": [5, 3, 2]}, "each of the 2 heads"),
        ({"top_k_tokens_per_head": [5, 0, 2]}, "between 1 and"),
        ({"top_k_tokens_per_head": [2, 1, 1], "n_candidates": 3}, "between 0 and 2.*n_candidates"),
        ({"n_candidates": -1}, "n_candidates"),
        ({"emb_dim": 0}, "emb_dim"),
        ({"method": "sum_gru"}, "`method` must be one of sum_rnn, sum_lstm"),
        ({"method": "sum_lstm"}, "tie_weights=True"),
        ({"n_tree_nodes": 51}, "`n_tree_nodes`.*between 1 and 50.*51"),
        ({"n_tree_nodes": 0}, "`n_tree_nodes`.*between 1 and 50.*0"),
        ({"n_heads": 4}, "`n_heads`.*between 1 and `n_predict=3`.*4"),
        ({"n_heads": 0}, "`n_heads`.*between 1"),
        ({"n_heads": 1, "n_candidates": 6}, "between 0 and 5, the number of leaves"),
    ],
)
def test_bad_configs(config, complaint):
    with pytest.raises(ValueError, match=complaint):
        MLPSpeculatorConfig(**config)


@torch.no_grad()
def test_fewer_heads_draft_what_a_speculator_of_fewer_heads_would():
    """But for the weight of the tokens, which goes by `n_predict`: it is put right here."""
    model = speculator()
    fewer = speculator(n_predict=2, n_candidates=4)
    fewer.load_state_dict({key: value for key, value in model.state_dict().items() if ".2." not in key})
    fewer.speculator.emb_scale = model.speculator.emb_scale
    model.config.n_heads, model.config.n_candidates = 2, 4
    inputs = torch.randn(2, 1, 16), torch.tensor([[1], [4]])
    drafted = model.generate_candidates(*inputs)
    assert drafted.shape == (2, 4, 2)
    assert torch.equal(drafted, fewer.generate_candidates(*inputs))
    for part, other in zip(model.generate_tree(*inputs, 9), fewer.generate_tree(*inputs, 9), strict=True):
        assert torch.equal(part, other)
    model.config.n_candidates = 16
    with pytest.raises(ValueError, match="between 0 and 15, the number of leaves"):
        model.generate_candidates(*inputs)


def test_dials_are_checked_at_each_call():
    model = speculator()
    model.config.n_candidates = 1000
    with pytest.raises(ValueError, match="n_candidates"):
        model.generate_candidates(torch.randn(1, 1, 16), torch.tensor([[1]]))
    with pytest.raises(ValueError, match="each of the 3 heads"):
        model.generate_candidates(torch.randn(1, 1, 16), torch.tensor([[1]]), [5], 1)


def test_lengths_that_do_not_fit():
    model = speculator()
    with pytest.raises(ValueError, match="= 6 tokens; got 5"):
        model(torch.randn(1, 4, 16), torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="got 6 and 7"):
        model(torch.randn(1, 4, 16), torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, 7, dtype=torch.long))
