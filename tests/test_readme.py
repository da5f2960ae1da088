"""The README's lines, on models that are here."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB, character_tokenizer, tiny_model

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.trainers import parse_recipe


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_code_on_generation(tmp_path, capsys):
    """All of it, one block after another, as a reader would paste it."""
    base_model, speculator = str(tmp_path / "base_model"), str(tmp_path / "speculator")
    tiny_model("llama").save_pretrained(base_model)
    character_tokenizer(eos_token="z").save_pretrained(base_model)
    torch.manual_seed(0)
    config = MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=32, base_model_name_or_path=base_model)
    MLPSpeculatorPreTrainedModel(config).save_pretrained(speculator)

    blocks = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "model.generate(" in code]
    assert len(blocks) == 8
    names = r'"meta-llama/[^"]*", "ibm-ai-platform/[^"]*"'
    assert re.search(names, blocks[0])
    variables = {}
    exec(re.sub(names, repr((base_model, speculator)), blocks[0]), variables)
    assert "steps=" in capsys.readouterr().out
    for block in blocks[1:]:
        exec(block, variables)
    plain = variables["model"].generate(**variables["inputs"], max_new_tokens=40, do_sample=False)
    assert variables["out"].sequences.tolist() == plain.tolist()
    assert variables["cache"].get_seq_length() == variables["text"].shape[1] - 1


def test_every_file_of_the_tree_is_there():
    (tree,) = re.findall(r"```\n(modeling_speculator/\n.*?)```", README, re.DOTALL)
    folder, named = None, set()
    for line in tree.splitlines():
        if line.startswith("  "):
            named |= {f"{folder}/{name}" for name in re.findall(r"\w+\.py\b", line)}
        else:
            folder = line.split("/")[0]
    for folder in ("modeling_speculator", "trainers", "model_cards", "recipes"):
        files = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")} - {f"{folder}/__init__.py"}
        assert {name for name in named if name.startswith(f"{folder}/")} == files


COMMANDS = [
    command.replace("\\\n", " ")
    for page in (README, (ROOT / "recipes/README.md").read_text())
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for command in re.findall(r"^((?:.*\\\n)*.*train_speculator\.py(?:.*\\\n)*.*)$", block, re.MULTILINE)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_train(command, tmp_path):
    """Every file that they name is there, and every flag and value is one that the script takes."""
    words = shlex.split(command)
    files = [word for word in words if word.startswith("recipes/")]
    assert all((ROOT / file).is_file() for file in files)
    config = words.index("--config")
    words[config + 1] = str(ROOT / words[config + 1])
    model, data, args = parse_recipe(words[config:])
    assert model.base_model
    assert (data.dataset is None) != (data.data_files is None)


def test_there_are_commands_that_train():
    assert len(COMMANDS) == 7


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "recipes/README.md"):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), link
