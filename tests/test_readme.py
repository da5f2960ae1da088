"""The README's lines, on models that are here."""

import re
from pathlib import Path

import torch
from tiny_models import VOCAB, tiny_model, word_tokenizer

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_ten_lines(tmp_path, capsys):
    base_model, speculator = str(tmp_path / "base_model"), str(tmp_path / "speculator")
    tiny_model("llama").save_pretrained(base_model)
    words = ["def", "quicksort(numbers):", *(f"word{n}" for n in range(2, VOCAB))]
    word_tokenizer(words).save_pretrained(base_model)
    torch.manual_seed(0)
    config = MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=32, base_model_name_or_path=base_model)
    MLPSpeculatorPreTrainedModel(config).save_pretrained(speculator)

    (lines,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "generate(" in code]
    names = r'"meta-llama/[^"]*", "ibm-ai-platform/[^"]*"'
    assert re.search(names, lines)
    exec(re.sub(names, repr((base_model, speculator)), lines), {})
    text, statistics = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert text.startswith("def quicksort(numbers): word")
    assert "steps=" in statistics


def test_every_file_of_the_tree_is_there():
    (tree,) = re.findall(r"```\n(modeling_speculator/\n.*?)```", README, re.DOTALL)
    folder, named = None, set()
    for line in tree.splitlines():
        if line.startswith("  "):
            named |= {f"{folder}/{name}" for name in re.findall(r"\w+\.py\b", line)}
        else:
            folder = line.split("/")[0]
    for folder in ("modeling_speculator", "trainers", "recipes"):
        files = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")} - {f"{folder}/__init__.py"}
        assert {name for name in named if name.startswith(f"{folder}/")} == files
