"""Versions on a Hub: pushed, loaded, refused, whole after every fault. By the real client, against a small server."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import commands
import pytest
import torch
from hub_server import TOKEN, problems_of
from tiny_models import VOCAB, character_tokenizer, tiny_model
from transformers import AutoModel

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.formats import save_arctic
from modeling_speculator.measuring.benchmarking import digest
from modeling_speculator.model_cards.provenance_file import write_provenance
from modeling_speculator.model_cards.repository import read_measured, without_paths


RECIPE = Path(__file__).parents[1] / "recipes/push_to_hub.py"
MACHINE = {"processor": "a CPU", "threads": 1, "date": "2026-01-01"}
FACTS = {"arguments": {}, "steps": 3, "seconds": 1, "machine": MACHINE}  # of a training


@pytest.fixture(scope="module", autouse=True)
def base_repository(client):
    """What the speculators here are trained for is on the Hub."""
    client.run("from huggingface_hub import HfApi; HfApi().create_repo('org/base')")


@pytest.fixture
def repo(request):
    """A repository of each test's own."""
    return f"org/{hashlib.sha1(request.node.name.encode()).hexdigest()[:10]}"


def save(folder, seed=0, **options):
    torch.manual_seed(seed)
    options = {"base_model_name_or_path": "org/base", "inner_dim": 16} | options
    MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=32, **options)).save_pretrained(folder)
    return folder


def publish(client, folder, repo, version=None, **options):
    return client.run(
        "from modeling_speculator.model_cards import publish\n"
        f"done = publish({str(folder)!r}, {repo!r}, {version!r}, **{options!r})\n"
        "result = [done.commit, done.is_new, sorted(done.files), done.left_out]"
    )


def weights_of(client, name, revision):
    """A digest of the weights, by a fresh load."""
    return client.run(
        "import hashlib; from transformers import AutoModel\n"
        f"state = AutoModel.from_pretrained({name!r}, revision={revision!r}).state_dict()\n"
        "result = hashlib.sha256(b''.join(state[key].numpy().tobytes() for key in sorted(state))).hexdigest()"
    )


def test_two_versions(hub, client, repo, tmp_path):
    folders = {f"{n}.0.0": save(tmp_path / str(n), seed=n) for n in (1, 2)}
    commits = {}
    for version, folder in folders.items():
        commits[version], is_new, *_ = publish(client, folder, repo, version)
        assert is_new and hub.repositories[repo].tags[f"v{version}"] == commits[version]
    assert hub.repositories[repo].branches["main"] == commits["2.0.0"]
    client.run("import modeling_speculator")
    loaded = {version: weights_of(client, repo, f"v{version}") for version in folders}
    assert loaded == {version: weights_of(client, str(folder), None) for version, folder in folders.items()}
    assert loaded["1.0.0"] != loaded["2.0.0"]
    publish(client, save(tmp_path / "3", seed=3), repo, "2.0.0-rc1")
    commits = {"1.0.0": commits["1.0.0"], "2.0.0rc1": hub.repositories[repo].branches["main"], **commits}
    listed = client.run(f"from modeling_speculator.model_cards import list_versions; result = list_versions({repo!r})")
    assert list(listed.items()) == [(f"v{version}", commit) for version, commit in commits.items()]


def test_the_same_again(hub, client, repo, tmp_path):
    """Sends nothing; a new version of it is a tag on the same commit; another content under its name is refused."""
    first, *_ = publish(client, save(tmp_path / "a", seed=1), repo, "1.0.0")
    hub.requests.clear()
    assert publish(client, tmp_path / "a", repo, "1.0.0")[:2] == [first, False]
    assert publish(client, tmp_path / "a", repo, "v1.0.1")[:2] == [first, False]
    assert not [path for method, path in hub.requests if "/commit/" in path or method == "PUT"]
    assert hub.repositories[repo].tags == {"v1.0.0": first, "v1.0.1": first}
    save(tmp_path / "b", seed=2)
    with pytest.raises(RuntimeError, match="ValueError: .* has a version v1.0.0 with other content"):
        publish(client, tmp_path / "b", repo, "1.0.0")
    assert hub.repositories[repo].branches["main"] == first
    hub.fail("/tag/", status=500, times=1, method="POST")  # a tag that can't be moved stays where it was
    with pytest.raises(RuntimeError):
        publish(client, tmp_path / "b", repo, "1.0.0", force=True)
    assert hub.repositories[repo].tags == {"v1.0.0": first, "v1.0.1": first}
    moved, *_ = publish(client, tmp_path / "b", repo, "1.0.0", force=True)
    assert moved != first and hub.repositories[repo].tags == {"v1.0.0": moved, "v1.0.1": first}
    # What an older version had is found again; without a version it is the branch that has to have it.
    assert publish(client, tmp_path / "a", repo, "1.0.2")[:2] == [first, False]
    again, is_new, *_ = publish(client, tmp_path / "a", repo)
    assert is_new and hub.repositories[repo].branches["main"] == again != first


def test_a_branch_for_nightly_work(hub, client, repo, tmp_path):
    first, *_ = publish(client, save(tmp_path / "a", seed=1), repo, "1.0.0")
    nightly, *_ = publish(client, save(tmp_path / "b", seed=2), repo, branch="nightly")
    assert hub.repositories[repo].branches == {"main": first, "nightly": nightly}
    assert hub.repositories[repo].tags == {"v1.0.0": first}


FAULTS = {
    "nobody": {"pattern": "/preupload/|/commit/", "status": 401, "times": 50},
    "not allowed": {"pattern": "/commit/", "status": 403},
    "somebody else committed": {"pattern": "/commit/", "status": 412},
    "a tag of that name": {"pattern": "/tag/", "status": 409},
    "broken in an upload": {"pattern": "/lfs/", "status": 500, "times": 50},
    "cut in an upload": {"pattern": "/lfs/", "status": None, "times": 50, "method": "PUT"},
    "a wrong hash": {"pattern": "/lfs/", "status": 422, "method": "PUT"},
    "broken before the tag": {"pattern": "/tag/", "status": 500, "times": 50},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_loses_nothing(hub, client, repo, fault, tmp_path):
    """The version before is untouched, and the same push, repeated, ends well."""
    client.run("import huggingface_hub.utils._http as http; http.time.sleep = lambda seconds: None")  # between retries
    first, *_ = publish(client, save(tmp_path / "a", seed=1), repo, "1.0.0")
    before = hub.files(repo, "v1.0.0")
    save(tmp_path / "b", seed=100 + list(FAULTS).index(fault))  # of weights that the server does not have
    hub.fail(**FAULTS[fault])
    with pytest.raises(RuntimeError) as raised:
        publish(client, tmp_path / "b", repo, "2.0.0")
    assert TOKEN not in str(raised.value)
    hub.faults.clear()
    assert hub.repositories[repo].tags == {"v1.0.0": first} and hub.files(repo, "v1.0.0") == before
    second, *_ = publish(client, tmp_path / "b", repo, "2.0.0")
    assert hub.repositories[repo].tags == {"v1.0.0": first, "v2.0.0": second}
    assert hub.files(repo, "v2.0.0")["model.safetensors"] == (tmp_path / "b/model.safetensors").read_bytes()
    assert len(hub.repositories[repo].commits) == 3  # the first, empty one, and one a version


def test_too_many_requests_are_made_later(hub, client, repo, tmp_path):
    hub.fail("/lfs/", status=429, method="PUT")
    commit, *_ = publish(client, save(tmp_path / "a", seed=200), repo, "1.0.0")
    assert hub.repositories[repo].tags == {"v1.0.0": commit} and not hub.faults


def test_nothing_by_accident(hub, client, repo, tmp_path):
    folder = save(tmp_path / "a")
    (folder / "checkpoint-3").mkdir()
    secrets = ("optimizer.pt", "training_args.bin", ".env", "notes.txt", "other.safetensors")
    secrets += ("checkpoint-3/model.safetensors",)
    for name in secrets:
        (folder / name).write_bytes(b"secret")
    facts = FACTS | {"data": {"data_files": [str(tmp_path / "mine/texts.jsonl")]}}
    (folder / "provenance.json").write_text(json.dumps(facts))
    _, _, files, left_out = publish(client, folder, repo, "1.0.0")
    sent = hub.files(repo, "v1.0.0")
    assert sorted(set(sent) - {".gitattributes"}) == files
    assert not [name for name in sent if Path(name).name in {Path(secret).name for secret in secrets[:5]}]
    names = [".env", "checkpoint-3", "notes.txt", "optimizer.pt", "other.safetensors", "training_args.bin"]
    assert left_out == names
    everything = b"\n".join(sent.values())
    assert str(tmp_path).encode() not in everything and TOKEN.encode() not in everything
    assert json.loads(sent["provenance.json"])["data"]["data_files"] == ["texts.jsonl"]
    assert problems_of(sent["README.md"].decode()) == []
    (folder / "provenance.json").write_text(json.dumps(facts | {"note": f"hf_{'x' * 34}"}))
    with pytest.raises(RuntimeError, match="looks like a token"):
        publish(client, folder, repo, "2.0.0")


@pytest.mark.parametrize(
    ("options", "call", "complaint"),
    [
        ({}, {"version": "1.0"}, "three numbers, as 1.0.0"),
        ({"base_model_name_or_path": "outputs/base/model"}, {}, "is no model of the Hub. Push that first"),
        ({"base_model_name_or_path": None}, {}, "is no model of the Hub"),
        ({}, {"base_model_revision": "0000"}, "org/base, the base model, has no commit 0000"),
        ({}, {"acceptance": "of_another.json"}, "was measured with another speculator"),
        ({}, {"latency": "of_another.json"}, "is no latency.json of benchmark_latency.py"),
        ({}, {"acceptance": "missing.json"}, "is no acceptance.json of evaluate_acceptance.py"),
    ],
)
def test_bad_input(client, repo, options, call, complaint, tmp_path):
    save(tmp_path / "a", **options)
    settings = {"weights": ["x", "y"], "dtype": "torch.float32", "speculator": "z"}
    (tmp_path / "of_another.json").write_text(json.dumps({"settings": settings}))
    files = ("acceptance", "latency")
    call = {key: str(tmp_path / value) if key in files else value for key, value in call.items()}
    with pytest.raises(RuntimeError, match=complaint):
        publish(client, tmp_path / "a", repo, **call)


def test_a_repository_of_something_else(hub, client, repo, base, tmp_path):
    """Is refused; and other people's files in ours stay."""
    save(tmp_path / "a")
    with pytest.raises(RuntimeError, match="org/base is the base model"):
        publish(client, tmp_path / "a", "org/base")
    client.run(
        f"from huggingface_hub import HfApi; HfApi().create_repo({repo!r})\n"
        f"HfApi().upload_folder(repo_id={repo!r}, folder_path={str(base)!r})"
    )
    before = hub.files(repo)
    with pytest.raises(RuntimeError, match="holds a model of type 'llama', which would be overwritten"):
        publish(client, tmp_path / "a", repo)
    assert hub.files(repo) == before
    client.run(
        f"from huggingface_hub import HfApi; HfApi().create_repo('{repo}-adapter')\n"
        f"HfApi().upload_file(path_or_fileobj=b'x', path_in_repo='adapter_config.json', repo_id='{repo}-adapter')"
    )
    with pytest.raises(RuntimeError, match="holds adapter_config.json, and no speculator"):
        publish(client, tmp_path / "a", f"{repo}-adapter", branch="nightly")
    assert hub.repositories[f"{repo}-adapter"].branches.keys() == {"main"}
    with pytest.raises(RuntimeError, match="Say whose repository it is to be: ORG/name"):
        publish(client, tmp_path / "a", "name")
    publish(client, tmp_path / "a", f"{repo}-ours")
    client.run(
        "from huggingface_hub import HfApi\n"
        "for name in ('handler.py', 'examples/demo.py', 'examples/model.safetensors'):\n"
        f"    HfApi().upload_file(path_or_fileobj=b'x', path_in_repo=name, repo_id='{repo}-ours')"
    )
    save(tmp_path / "b", seed=7)
    publish(client, tmp_path / "b", f"{repo}-ours", "1.0.0")
    assert {"handler.py", "examples/demo.py", "examples/model.safetensors"} <= hub.files(
        f"{repo}-ours", "v1.0.0"
    ).keys()
    with pytest.raises(RuntimeError, match="is public already"):
        publish(client, tmp_path / "b", f"{repo}-ours", private=True)


def test_weights_in_several_files(hub, client, repo, tmp_path):
    """Sent by their index, unless there is one of all, which transformers prefers; those of an older version go."""
    whole, parts = save(tmp_path / "whole"), tmp_path / "parts"
    client.run(
        "import modeling_speculator; from transformers import AutoModel\n"
        f"AutoModel.from_pretrained({str(whole)!r}).save_pretrained({str(parts)!r}, max_shard_size='20KB')"
    )
    (parts / "model.fp16.safetensors").write_bytes(b"")
    *_, left_out = publish(client, parts, repo, "1.0.0")
    assert left_out == ["model.fp16.safetensors"]
    assert weights_of(client, repo, "v1.0.0") == weights_of(client, str(whole), None)
    publish(client, whole, repo, "2.0.0")
    assert [name for name in hub.files(repo, "v2.0.0") if "safetensors" in name] == ["model.safetensors"]
    assert weights_of(client, repo, "v2.0.0") == weights_of(client, str(whole), None)
    shutil.copy(save(tmp_path / "other", seed=8) / "model.safetensors", parts)
    assert publish(client, parts, repo, "3.0.0")[3] == sorted(path.name for path in parts.glob("model[-.]?*of*")) + [
        "model.fp16.safetensors", "model.safetensors.index.json"
    ]  # fmt: skip
    assert weights_of(client, repo, "v3.0.0") == weights_of(client, str(tmp_path / "other"), None)
    (parts / "model.safetensors").unlink()
    next(parts.glob("model-00001-of-*")).unlink()
    with pytest.raises(RuntimeError, match="model.safetensors.index.json"):
        publish(client, parts, repo, "4.0.0")


def test_a_base_model_that_is_not_there_yet(client, repo, tmp_path):
    folder = save(tmp_path / "a", base_model_name_or_path="org/nobody")
    warn = "import warnings; warnings.filterwarnings({!r}, 'The Hub has no model')"
    client.run(warn.format("error"))
    with pytest.raises(RuntimeError, match="UserWarning: The Hub has no model org/nobody that you can see"):
        publish(client, folder, repo, "1.0.0")
    client.run(warn.format("ignore"))
    assert publish(client, folder, repo, "1.0.0")[1]


def test_a_folder_that_is_no_speculator(client, repo, tmp_path):
    with pytest.raises(RuntimeError, match="no config.json"):
        publish(client, tmp_path, repo)
    save(tmp_path / "a")
    (tmp_path / "a/model.safetensors").rename(tmp_path / "a/pytorch_model.bin")
    with pytest.raises(RuntimeError, match="not in the published form.* Write it so: recipes/convert"):
        publish(client, tmp_path / "a", repo)
    tiny_model("llama").save_pretrained(tmp_path / "b")
    with pytest.raises(RuntimeError, match="holds a model of type 'llama', which is no speculator"):
        publish(client, tmp_path / "b", repo)
    torch.manual_seed(0)
    save_arctic(MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=32)), tmp_path / "c", ["L"])
    with pytest.raises(RuntimeError, match="not in the published form"):
        publish(client, tmp_path / "c", repo)


def test_from_python(hub, client, repo, tmp_path):
    save(tmp_path / "a")
    client.run(
        "import modeling_speculator; from transformers import AutoModel\n"
        f"AutoModel.from_pretrained({str(tmp_path / 'a')!r}).push_to_hub({repo!r}, version='1.2.3')"
    )
    sent = hub.files(repo, "v1.2.3")
    assert sent["model.safetensors"] == (tmp_path / "a/model.safetensors").read_bytes()
    assert {"README.md", "hub_entry.py", "custom_generate/generate.py"} <= sent.keys()


def test_the_provenance_of_other_weights_is_not_sent(hub, client, repo, tmp_path):
    write_provenance(save(tmp_path / "a"), FACTS | {"steps": 3})
    change = "speculator.speculator.head[0].weight.data[0] += 1\n"
    warn = "import warnings; warnings.filterwarnings({!r}, 'These weights are not, to the last bit')"
    client.run(warn.format("error"))
    load = "import modeling_speculator; from transformers import AutoModel\n"
    load += f"speculator = AutoModel.from_pretrained({str(tmp_path / 'a')!r})\n"
    client.run(f"{load}speculator.push_to_hub({repo!r}, version='1.0.0')")
    client.run(f"{load}speculator.save_pretrained({str(tmp_path / 'b')!r}, push_to_hub=True, repo_id={repo!r})")
    assert hub.repositories[repo].branches["main"] == hub.repositories[repo].tags["v1.0.0"]  # the same, by both ways
    read = "from modeling_speculator.model_cards.provenance_file import read_provenance\n"
    assert client.run(f"{read}result = read_provenance({repo!r}, 'v1.0.0')['steps']") == 3
    assert client.run(f"{read}result = read_provenance('org/base')") is None
    with pytest.raises(RuntimeError, match="UserWarning: These weights are not, to the last bit"):
        client.run(f"{load}{change}speculator.push_to_hub({repo!r}, version='2.0.0')")
    client.run(warn.format("ignore"))
    client.run(f"{load}{change}speculator.push_to_hub({repo!r}, version='2.0.0')")
    assert "provenance.json" not in hub.files(repo, "v2.0.0")
    again = load.replace(repr(str(tmp_path / "a")), f"{repo!r}, revision='v1.0.0'")
    client.run(f"{again}speculator.push_to_hub('{repo}-again', version='1.0.0')")
    sent = hub.files(f"{repo}-again", "v1.0.0")
    assert sent["provenance.json"] == hub.files(repo, "v1.0.0")["provenance.json"]
    save(tmp_path / "a", seed=1)
    with pytest.raises(RuntimeError, match="provenance.json tells of other weights"):
        publish(client, tmp_path / "a", repo, "3.0.0")


def test_figures_beside_another_base_model(client, repo, tmp_path):
    folder = save(tmp_path / "a")
    own = digest(AutoModel.from_pretrained(folder))
    beside = {"base_model": "org/base", "base_model_weights": "its own", "base_model_dtype": "torch.float32"}
    write_provenance(folder, FACTS | beside)
    known = {"its own": None, "another's": "beside another base model than org/base", "half-partly": None, None: None}
    for base, problem in known.items():
        row = {"base_model_weights": base, "weights": own, "dtype": "torch.float32", "speedup": 1, "n_candidates": 1}
        (tmp_path / "latency.json").write_text(json.dumps([row]))
        provenance = json.loads((folder / "provenance.json").read_text())
        with pytest.raises(ValueError, match=problem) if problem else nullcontext():
            read_measured("latency", tmp_path / "latency.json", AutoModel.from_pretrained(folder), provenance)
    (tmp_path / "latency.json").write_text(json.dumps([row | {"base_model_weights": "another's"}]))
    partly, other_dtype = {"base_model_weights": "half-partly"}, {"base_model_dtype": "torch.bfloat16"}
    for unlike in (provenance | partly, provenance | other_dtype, None):
        read_measured("latency", tmp_path / "latency.json", AutoModel.from_pretrained(folder), unlike)


def test_paths_of_a_machine():
    """Of any machine: what is sent may have been written on another."""
    told = {
        "/home/me/base": "base",
        "../x": "x",
        "outputs/code/stage1": "stage1",
        "texts/mine.jsonl": "mine.jsonl",
        "org/name": "org/name",
        "file:///home/me/x.jsonl": "x.jsonl",
        "https://a.b/c/d.jsonl": "https://a.b/c/d.jsonl",
        "a CPU w/ 2/3/4 cores": "a CPU w/ 2/3/4 cores",
    }
    assert without_paths({"data": [list(told)]}) == {"data": [list(told.values())]}


@pytest.fixture(scope="module")
def base(client, tmp_path_factory):
    """A base model on the Hub, and here."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_model("llama").save_pretrained(folder)
    character_tokenizer(eos_token="z").save_pretrained(folder)
    client.run(
        f"from huggingface_hub import HfApi; HfApi().upload_folder(repo_id='org/base', folder_path={str(folder)!r})"
    )
    return folder


def test_both_models_by_one_name(hub, client, base, repo, tmp_path):
    commit = hub.repositories["org/base"].branches["main"]
    publish(client, save(tmp_path / "a"), repo, "1.0.0", base_model="org/base", base_model_revision=commit)
    load = (
        "from modeling_speculator import load_speculator_and_base\n"
        f"speculator, model, tokenizer = load_speculator_and_base({repo!r}, revision='v1.0.0')\n"
        "out = model.generate(**tokenizer('abc', return_tensors='pt'), assistant_model=speculator, max_new_tokens=9, "
        "do_sample=False)\n"
        "result = out.tolist(), model.config.name_or_path, speculator.config.base_model_revision"
    )
    texts, name, revision = client.run(load)
    assert (name, revision) == ("org/base", commit)
    tokens = character_tokenizer(eos_token="z")("abc", return_tensors="pt")
    assert tiny_model("llama").generate(**tokens, max_new_tokens=9, do_sample=False).tolist() == texts
    # Offline, from the cache.
    hub.requests.clear()
    client.run("import huggingface_hub.constants as c; c.HF_HUB_OFFLINE = True")
    try:
        assert client.run(load)[0] == texts and not hub.requests
    finally:
        client.run("import huggingface_hub.constants as c; c.HF_HUB_OFFLINE = False")


def test_a_downloaded_config_names_no_path(hub, client, repo, tmp_path):
    publish(client, save(tmp_path / "a"), repo)
    repository = hub.repositories[repo]
    for path in (str(tmp_path), "../../models/secret", "~/model"):
        files = dict(repository.commits[repository.branches["main"]])
        config = json.loads(hub.blobs[files["config.json"]]) | {"base_model_name_or_path": path}
        content = json.dumps(config).encode()
        files["config.json"] = hashlib.sha256(content).hexdigest()
        hub.blobs[files["config.json"]] = content
        repository.commit("main", files, "another config")
        with pytest.raises(RuntimeError, match="ValueError: .* as its base model, which is a path"):
            client.run(f"from modeling_speculator import load_speculator_and_base as load; load({repo!r})")


WITHOUT_THE_PACKAGE = """
import importlib.util, json, sys
assert importlib.util.find_spec("modeling_speculator") is None
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationMixin
tokenizer = AutoTokenizer.from_pretrained("org/base")
model = AutoModelForCausalLM.from_pretrained("org/base", dtype="auto")
inputs = tokenizer("abc", return_tensors="pt")
options = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
plain = model.generate(**inputs, **options)
before = GenerationMixin._assisted_decoding
for repo in sys.argv[1:]:
    speculator = AutoModel.from_pretrained(repo, dtype=model.dtype, trust_remote_code=True).to(model.device)
    out = model.generate(**inputs, assistant_model=speculator, custom_generate=repo, trust_remote_code=True, **options)
    assert GenerationMixin._assisted_decoding is before
    assert out.sequences.tolist() == plain.sequences.tolist()
    try:
        model.generate(**inputs, assistant_model=model, custom_generate=repo, trust_remote_code=True)
    except ValueError as error:
        assert "Give a speculator" in str(error)
    else:
        raise AssertionError
    print(json.dumps([speculator.config.model_type, out.speculation.tokens_per_step]))
"""


def test_without_the_package(hub, client, base, repo, tmp_path):
    """In a virtual environment that has transformers, and not this package: three repositories, each with its code."""
    code = "from modeling_speculator import MedusaConfig, MedusaModel\n"
    config = f"MedusaConfig(vocab_size={VOCAB}, emb_dim=32, base_model_name_or_path='org/base')"
    client.run(f"{code}MedusaModel({config}).save_pretrained({str(tmp_path / 'medusa')!r})")
    publish(client, tmp_path / "medusa", f"{repo}-medusa")
    code = "from modeling_speculator.drafters import ContextConfig, ContextSpeculator\n"
    config = config.replace("MedusaConfig(", "ContextConfig(context_heads=2, feature_layers=[0, 1], ")
    client.run(f"{code}ContextSpeculator({config}).save_pretrained({str(tmp_path / 'context')!r})")
    publish(client, tmp_path / "context", f"{repo}-context")
    publish(client, save(tmp_path / "a"), repo)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():  # of these the .pth file of an editable installation
        if "modeling_speculator" not in path.name:
            (packages / path.name).symlink_to(path)
    command = [tmp_path / "venv/bin/python", "-c", WITHOUT_THE_PACKAGE, repo, f"{repo}-medusa", f"{repo}-context"]
    env = os.environ | hub.environment(tmp_path / "home")
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert found.keys() == {"mlp_speculator", "medusa_heads", "context_speculator"} and min(found.values()) >= 1


def test_the_commands(hub, base, repo, tmp_path):
    env = hub.environment(tmp_path / "home")
    save(tmp_path / "a", seed=300)

    def run_elsewhere(*command, **more):
        """In an environment of its own."""
        command = [sys.executable, *map(str, command)]
        return subprocess.run(command, env=os.environ | env | more, capture_output=True, text=True)

    run = partial(commands.run, env=env)
    push = [RECIPE, "--speculator", tmp_path / "a", "--repo_id", repo, "--version", "1.0.0"]
    dry = run(*push, "--dry_run")
    assert dry.returncode == 0, dry.stderr
    assert "model.safetensors" in dry.stdout and "Would be sent to" in dry.stdout and repo not in hub.repositories
    nobody = run_elsewhere(*push, HF_TOKEN="", HF_HUB_DISABLE_IMPLICIT_TOKEN="1")
    assert nobody.returncode == 1 and "The same command goes on" in nobody.stderr
    hub.fail("/lfs/", status=400, times=50, method="PUT")  # which the client does not try again
    cut = run(*push, "--private")
    hub.faults.clear()
    assert cut.returncode == 1 and "the same command goes on" in cut.stderr.lower() and "Traceback" not in cut.stderr
    done = run(*push, "--private")
    assert done.returncode == 0, done.stderr
    assert "Sent:" in done.stdout and TOKEN not in done.stdout + done.stderr
    assert hub.repositories[repo].private
    assert run(*push).stdout.splitlines()[-1].startswith("Nothing new to send")
    listed = run(RECIPE, "--repo_id", repo, "--list")
    assert listed.stdout.split() == ["v1.0.0", hub.repositories[repo].tags["v1.0.0"]]
    hf = ("-m", "huggingface_hub.cli.hf")
    downloaded = run_elsewhere(*hf, "download", repo, "--revision", "v1.0.0", "--local-dir", tmp_path / "there")
    assert downloaded.returncode == 0, downloaded.stderr
    for name in ("model.safetensors", "README.md", "custom_generate/generate.py"):
        assert (tmp_path / "there" / name).read_bytes() == hub.files(repo, "v1.0.0")[name]
