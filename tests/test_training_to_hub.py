"""The whole way: a speculator is trained beside a base model of the Hub, measured, pushed, and loaded from there."""

import json
import random
from pathlib import Path

import commands
import pytest
from hub_server import TOKEN
from tiny_models import VOCAB, tiny_model, word_tokenizer
from trainings import arguments, rows, speculator

from modeling_speculator.trainers import SpeculatorTrainer


RECIPES = Path(__file__).parents[1] / "recipes"


GENERATE = """
from modeling_speculator import load_speculator_and_base
from transformers import AutoModel
speculator, model, tokenizer = load_speculator_and_base("org/trained", revision="v1.1.0")
texts, steps = [], []
for drafter in (speculator, AutoModel.from_pretrained(FOLDER, dtype=model.dtype)):
    out = model.generate(**tokenizer("w1 w2 w3", return_tensors="pt"), assistant_model=drafter, max_new_tokens=30,
                         do_sample=False, return_dict_in_generate=True)
    texts.append(out.sequences.tolist())
    steps.append(list(out.speculation.per_sequence[0].emitted_per_step))
plain = model.generate(**tokenizer("w1 w2 w3", return_tensors="pt"), max_new_tokens=30, do_sample=False)
result = [*texts, plain.tolist(), *steps]
"""


def test_trained_measured_pushed_loaded(hub, client, tmp_path):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    words = [f"w{n}" for n in range(VOCAB)]
    word_tokenizer(words).save_pretrained(base)
    client.run(
        "from huggingface_hub import HfApi; HfApi().create_repo('org/base')\n"
        f"HfApi().upload_folder(repo_id='org/base', folder_path={str(base)!r})"
    )
    documents = [" ".join(random.Random(seed).choices(words, k=80)) for seed in range(60)]
    lines = (json.dumps({"text": document}) + "\n" for document in documents)
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    env = hub.environment(tmp_path / "home")

    def run(script, returncode=0, **flags):
        arguments = []
        for name, value in flags.items():
            arguments += [f"--{name}", *(value if isinstance(value, list) else [value])]
        done = commands.run(RECIPES / script, *arguments, env=env)
        assert done.returncode == returncode, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done.stderr

    train = {"base_model": "org/base", "data_files": tmp_path / "texts.jsonl", "use_cpu": "true"}
    train |= {"per_device_train_batch_size": 4, "save_steps": 2, "max_steps": 4, "logging_steps": 1}
    train |= {"validation_fraction": 0.1, "push_to_hub": "true", "hub_model_id": "org/trained"}
    train |= {"precision": "float32"}  # as it is measured, so that the figures' base model is compared
    new = {"config": RECIPES / "quickstart/stage1.yaml", "sequence_length": 32, "generation_length": 12}
    distil = train | {"config": RECIPES / "quickstart/stage2.yaml", "prompt_length": 8, "generation_length": 12}
    distil |= {"speculator": tmp_path / "stage1", "output_dir": tmp_path / "stage2", "hub_strategy": "end"}
    hub.fail("/commit/nightly", status=403)  # of the first checkpoint; the training goes on
    log = run("train_speculator.py", **train | new, output_dir=tmp_path / "stage1", hub_revision="nightly")
    assert "checkpoint-2 was not pushed" in log
    repository = hub.repositories["org/trained"]
    assert repository.tags == {} and len(repository.commits) > 2  # of checkpoints, too
    assert set(hub.files("org/trained", "main")) == {".gitattributes"}
    run("train_speculator.py", **distil, hub_version="1.0.0")
    version, commits = dict(repository.tags), len(repository.commits)
    run("train_speculator.py", **distil, hub_version="1.0.0")  # finished before: the same again, and nothing sent
    assert repository.tags == version and len(repository.commits) == commits
    for option, complaint in (
        ({"hub_version": "1.0.0"}, "error: org/trained has a version v1.0.0 already"),
        ({"hub_private_repo": "true"}, "error: org/trained is public already"),
    ):
        log = run("train_speculator.py", returncode=1, **train | new | option, output_dir=tmp_path / "again")
        assert complaint in log and not (tmp_path / "again").exists()
    sent = hub.files("org/trained", "v1.0.0")
    assert sent["model.safetensors"] == (tmp_path / "stage2/model.safetensors").read_bytes()
    assert not [name for name in sent if "checkpoint" in name or name.endswith((".bin", ".pt"))]
    card = sent["README.md"].decode()
    assert "**Stage 1**, on text: 4 steps" in card and "**Stage 2**" in card and "| step | 1 | 2 | 3 | 4 |" in card
    revision = hub.repositories["org/base"].branches["main"]
    assert json.loads(sent["config.json"])["base_model_revision"] == revision
    assert f"org/base at commit {revision}" in card

    run("evaluate_acceptance.py", base_model="org/base", speculator=tmp_path / "stage2", max_new_tokens=12,
        prompts=write(tmp_path / "prompts.txt", "w1 w2 w3\nw4 w5\n"), output=tmp_path / "acceptance")  # fmt: skip
    run("push_to_hub.py", speculator=tmp_path / "stage2", repo_id="org/trained", version="1.1.0",
        acceptance=tmp_path / "acceptance/acceptance.json")  # fmt: skip
    measured = json.loads((tmp_path / "acceptance/acceptance.json").read_text())
    card = hub.files("org/trained", "v1.1.0")["README.md"].decode()
    assert f"| {measured['tokens_per_step']:.3f} |" in card

    there, here, plain, steps_there, steps_here = client.run(
        GENERATE.replace("FOLDER", repr(str(tmp_path / "stage2")))
    )
    assert there == here == plain
    assert steps_there == steps_here


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"hub_strategy": "all_checkpoints"}, "pushed at the `end`, or at `every_save`"),
        ({"hub_always_push": True}, "drop `hub_always_push`"),
        ({"hub_version": "one"}, "three numbers"),
        ({}, "is no model of the Hub. Push that first"),
    ],
)
def test_what_would_stop_a_push_stops_the_training(options, complaint, llama, tmp_path):
    """Before it begins, and before the Hub is asked anything."""
    args = arguments(tmp_path, push_to_hub=True, hub_model_id="org/name", **options)
    with pytest.raises(ValueError, match=complaint):
        SpeculatorTrainer(model=speculator(), base_model=llama, args=args, train_dataset=rows(16, 12))
