"""The plugin of vLLM, without vLLM: its network is ours, on stand-ins of vLLM's layers, and it keeps to itself."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import stand_in_vllm
import torch
from drafters import context_speculator
from safetensors.torch import load_file
from test_formats import lstm_config, write
from test_residual import new as residual
from tiny_models import tiny_model
from transformers import AutoConfig

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel, doctor
from modeling_speculator.drafters import DRAFTERS
from modeling_speculator.formats import save_arctic


SHAPE = {"vocab_size": 40, "emb_dim": 24}
FORMS = [
    shape | cell
    for shape in (
        {"n_predict": 1},
        {"n_predict": 3},
        {"n_predict": 4, "inner_dim": 16},
        {"n_predict": 2, "inner_dim": 32, "scale_input": True},
    )
    for cell in ({}, {"tie_weights": True}, {"tie_weights": True, "method": "sum_lstm"})
]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """The plugin's module, of stand-ins."""
    folder = str(stand_in_vllm.write(tmp_path_factory.mktemp("stand_in")))
    sys.path.insert(0, folder)
    try:
        from modeling_speculator_vllm import network

        yield network
    finally:
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.split(".")[0] in ("vllm", "modeling_speculator_vllm")]:
            del sys.modules[name]


def vllm_config(config, **more):
    """What of vLLM's is read, for a base model that fits."""
    base = {"hidden_size": config.emb_dim, "vocab_size": config.vocab_size, "n": 1, "sampling": "greedy"}
    base |= {"v2": True, "pipeline": 1} | more
    target = SimpleNamespace(get_hidden_size=lambda: base["hidden_size"], get_vocab_size=lambda: base["vocab_size"])
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
        speculative_config=SimpleNamespace(
            draft_model_config=SimpleNamespace(hf_config=config),
            target_model_config=target,
            num_speculative_tokens=base["n"],
            draft_sample_method=base["sampling"],
        ),
        use_v2_model_runner=base["v2"],
        parallel_config=SimpleNamespace(pipeline_parallel_size=base["pipeline"]),
    )


def config_of(network, folder):
    from modeling_speculator_vllm.configuration import MODELS

    written = json.loads((folder / "config.json").read_text()).get("model_type", "mlp_speculator")
    theirs = {model.config_class.model_type: model.config_class for model in MODELS}
    return theirs.get(written, theirs["mlp_speculator"]).from_pretrained(folder)


def served(network, folder):
    """A checkpoint as vLLM loads it, and the names of weights that were set."""
    module = network.MLPSpeculator(vllm_config=vllm_config(config_of(network, folder)))
    return module, module.load_weights(load_file(folder / "model.safetensors").items())


def assert_same_logits(model, module, base_model=None):
    generator = torch.Generator().manual_seed(1)
    n, rows = model.config.n_predict, 3
    states = torch.randn(2, rows, model.config.emb_dim, generator=generator)
    tokens = torch.randint(model.config.vocab_size, (2, rows - 1 + n), generator=generator)
    expected = model(states, tokens, base_model=base_model).logits
    hidden_states = states.flatten(0, 1)
    for step in range(n):
        input_ids = tokens[:, step : step + rows].flatten()
        sampled_from, hidden_states = module(input_ids, None, hidden_states, spec_step_idx=step)
        logits = module.compute_logits(sampled_from, spec_step_idx=step)
        torch.testing.assert_close(logits.view(2, rows, -1), expected[step])
        assert module.get_top_tokens(sampled_from, step).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_has_our_logits(network, tmp_path, form):
    torch.manual_seed(0)
    model = MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(**SHAPE, **form)).eval()
    model.save_pretrained(tmp_path)
    module, names = served(network, tmp_path)
    assert names == model.state_dict().keys()
    assert_same_logits(model, module)
    theirs = config_of(network, tmp_path)
    for key in ("vocab_size", "emb_dim", "n_predict", "tie_weights", "scale_input", "method"):
        assert getattr(theirs, key) == getattr(model.config, key)
    assert theirs.num_nextn_predict_layers == theirs.num_hidden_layers == model.config.n_predict
    assert (theirs.model_type, theirs.hidden_size, theirs.num_attention_heads) == ("mtp", 24, 64)


@pytest.mark.parametrize("form", [{}, {"tie_weights": True}, {"inner_dim": 16}], ids=str)
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_form_that_is_bound_to_its_base_model(network, tmp_path, family, form):
    """vLLM puts that one's embeddings and LM head, a bias too, where it looks for them."""
    base_model = tiny_model(family)
    if base_model.lm_head.bias is not None:
        torch.nn.init.normal_(base_model.lm_head.bias)
    model = residual(base_model, **form)
    model.save_pretrained(tmp_path)
    module, names = served(network, tmp_path)
    assert names == {name for name in model.state_dict() if "sketch" not in name}
    assert not (module.has_own_embed_tokens or module.has_own_lm_head)
    module.model.embed_tokens, module.lm_head = base_model.get_input_embeddings(), base_model.lm_head
    assert_same_logits(model, module, base_model)


def test_a_context_layer_is_refused(network, tmp_path):
    from modeling_speculator_vllm.configuration import ContextConfig

    context_speculator(tiny_model("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not serve speculators with a context layer"):
        ContextConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("form", [{}, {"tie_weights": True}, {"tie_weights": True, "method": "sum_lstm"}], ids=str)
def test_arctics_forms(network, tmp_path, form):
    torch.manual_seed(0)
    model = MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(**SHAPE, inner_dim=16, **form)).eval()
    save_arctic(model, tmp_path, ["LlamaForCausalLM"])
    assert_same_logits(model, served(network, tmp_path)[0])


def test_layers_in_sequentials_and_copies(network, tmp_path):
    torch.manual_seed(0)
    model = MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(**SHAPE, inner_dim=16, tie_weights=True)).eval()
    weights = {}
    for name, weight in model.state_dict().items():
        layer, number, last = name.removeprefix("speculator.").split(".")
        weights[f"{layer}.{number}.{last}" if layer == "head" else f"{layer}.{number}.0.{last}"] = weight
    write(tmp_path, lstm_config(method="sum_rnn", tie_lstm_embs=False), weights, binary=False)
    assert_same_logits(model, served(network, tmp_path)[0])


def test_what_does_not_fit_a_config(network, tmp_path):
    model = MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(**SHAPE))
    model.save_pretrained(tmp_path)
    module = network.MLPSpeculator(vllm_config=vllm_config(config_of(network, tmp_path)))
    weights = dict(model.state_dict())
    one = weights.pop("speculator.ln.1.bias")
    with pytest.raises(ValueError, match=r"it lacks \['speculator.ln.1.bias'\] and has nothing too many.*convert.py"):
        module.load_weights(weights.items())
    with pytest.raises(ValueError, match=r"lacks nothing and has \['speculator.ln.7.bias'\] too many"):
        module.load_weights((weights | {"ln.1.bias": one, "ln.7.bias": one}).items())
    with pytest.raises(ValueError, match=r"`speculator.ln.1.bias` of shape \(23,\) does not fit config.json"):
        module.load_weights((weights | {"ln.1.bias": one[1:]}).items())


@pytest.mark.parametrize(
    ("vllm", "complaint"),
    [
        ({"n": 4}, "`num_speculative_tokens` is 4, but the speculator has 3 heads"),
        ({"n": 6}, "`num_speculative_tokens` is 6, but the speculator has 3 heads"),
        ({"hidden_size": 32}, "made for another base model: for hidden size 24, not 32"),
        ({"vocab_size": 41}, "made for another base model: for vocabulary 40, not 41"),
        ({"v2": False}, "VLLM_USE_V2_MODEL_RUNNER=1"),
        ({"pipeline": 2}, "pipeline parallelism is not supported"),
        ({"sampling": "probabilistic"}, "`draft_sample_method` is 'probabilistic'"),
    ],
    ids=str,
)
def test_what_is_refused(network, tmp_path, vllm, complaint):
    MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(**SHAPE)).save_pretrained(tmp_path)
    config = vllm_config(config_of(network, tmp_path), **vllm)
    with pytest.raises(ValueError, match=f"can't be served: .*{complaint}"):
        network.MLPSpeculator(vllm_config=config)


def test_forms_that_are_refused(network, tmp_path):
    for config, complaint in (
        (lstm_config(emb_dim="16.16"), "of several widths"),
        (lstm_config(tie_lstm_embs=False), "An embedding for each gate"),
        ({"model_type": "mlp_speculator", "method": "medusa"}, "serves the cells sum_rnn and sum_lstm, not 'medusa'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=complaint):
            config_of(network, tmp_path)


@pytest.mark.parametrize(
    ("name", "before", "lacks"),
    [
        ("__init__.py", "ModelRegistry", "vllm.ModelRegistry"),
        ("model_executor/layers/logits_processor.py", None, "vllm.model_executor.layers.logits_processor"),
        ("v1/worker/gpu/spec_decode/multi_module_mtp/speculator.py", "spec_step_idx", "spec_step_idx in vllm.v1."),
    ],
)
def test_a_vllm_that_lacks_what_is_needed(network, tmp_path, monkeypatch, caplog, name, before, lacks):
    """Without a file, or with another name in it: nothing is registered, and one line says so."""
    import modeling_speculator_vllm

    file = stand_in_vllm.write(tmp_path) / "vllm" / name
    file.write_text(file.read_text().replace(before, "another")) if before else file.unlink()
    for module in [module for module in sys.modules if module.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    modeling_speculator_vllm.register()
    (line,) = caplog.messages
    assert line.startswith("MLP speculators can't be served: this vLLM lacks ") and lacks in line
    assert line.endswith("vLLM 0.32 and 0.33 are known to work.")
    assert AutoConfig.for_model("mlp_speculator").model_type == "mlp_speculator"


def test_the_doctor_says_so(network, monkeypatch, capsys):
    doctor.show_vllm()
    monkeypatch.setattr("modeling_speculator_vllm.contract.missing", lambda: ["its heart"])
    doctor.show_vllm()
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    doctor.show_vllm()
    serves, lacks, not_there = capsys.readouterr().out.splitlines()
    assert (serves, not_there) == ("vllm: serves MLP speculators", "vllm: not installed")
    assert "this vLLM lacks its heart" in lacks


# In a fresh interpreter


def in_python(tmp_path, code):
    """Of a new process that has a stand-in of vLLM: what it prints."""
    folder = stand_in_vllm.write(tmp_path / "stand_in")
    start = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    start += """
from importlib.metadata import entry_points
def load():
    (found,) = entry_points(group="vllm.general_plugins", name="mlp_speculator")
    found.load()()
"""
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done


def test_it_registers_and_changes_nothing_else(tmp_path):
    in_python(
        tmp_path,
        """
from transformers import AutoConfig, GenerationMixin
before = dict(vars(GenerationMixin))
load()
load()  # vLLM may, in each of its processes
from vllm import ModelRegistry
from vllm.transformers_utils.config import _CONFIG_REGISTRY
assert ModelRegistry.models == {"MLPSpeculatorPreTrainedModel": "modeling_speculator_vllm.network:MLPSpeculator"}
assert _CONFIG_REGISTRY["mlp_speculator"].__module__ == "modeling_speculator_vllm.configuration"
assert _CONFIG_REGISTRY["other"] == "kept"
assert AutoConfig.for_model("mlp_speculator").model_type == "mtp"
assert vars(GenerationMixin) == before
assert "modeling_speculator" not in sys.modules and "modeling_speculator_vllm.network" not in sys.modules
""",
    )


@pytest.mark.parametrize("order", ["load(); import modeling_speculator", "import modeling_speculator; load()"])
@pytest.mark.parametrize("form", ["mlp_speculator", "residual_speculator"])
def test_a_process_that_uses_both(tmp_path, order, form):
    """vLLM reads a config.json through its own registry, and a model of ours is loaded before and after."""
    torch.manual_seed(0)
    config_class, model_class = {theirs.model_type: (theirs, model) for theirs, model in DRAFTERS.items()}[form]
    model = model_class(config_class(**SHAPE, n_candidates=4, base_model_name_or_path="base"))
    model.save_pretrained(tmp_path / "speculator")
    in_python(
        tmp_path,
        f"""
from transformers import AutoConfig, AutoModel
from vllm.transformers_utils.config import _CONFIG_REGISTRY
{order}
for _ in range(2):
    model = AutoModel.from_pretrained("speculator", n_candidates=3)
    assert type(model).__module__ == {model_class.__module__!r}
    assert (model.config.model_type, model.config.n_candidates) == ({form!r}, 3)
    model.save_pretrained("again")
    assert open("again/config.json").read().count("mtp") == 0
    AutoConfig.register({form!r}, _CONFIG_REGISTRY[{form!r}], exist_ok=True)  # as vLLM does
    assert AutoConfig.from_pretrained("speculator").model_type == "mtp"
""",
    )
    ours = AutoConfig.from_pretrained(tmp_path / "speculator")
    assert ours.model_type == form and ours.n_candidates == 4
