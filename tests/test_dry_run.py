"""A dry run of every shipped recipe, on nothing but a config.json of the true shape."""

import re
from pathlib import Path

import pytest
from tiny_models import FAMILIES
from transformers import GPTBigCodeConfig, LlamaConfig

from modeling_speculator.trainers import dry_run


RECIPES = Path(__file__).parents[1] / "recipes"
LLAMA_2_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
TARGETS = {  # config, and parameters of base model and speculator (of the published checkpoints)
    "llama2-7b": (
        LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
        ("6.738 B", "836.8 M"),
    ),
    "llama2-13b": (LlamaConfig(**LLAMA_2_13B), ("13.016 B", "841.0 M")),
    "codellama-13b": (
        LlamaConfig(**LLAMA_2_13B, vocab_size=32016, max_position_embeddings=16384),
        ("13.016 B", "1957.6 M"),
    ),
    "granite-20b": (
        GPTBigCodeConfig(
            vocab_size=49152,
            n_embd=6144,
            n_layer=52,
            n_head=48,
            n_inner=24576,
            n_positions=8192,
            bos_token_id=0,
            eos_token_id=0,
        ),
        ("20.067 B", "2105.6 M"),
    ),
    "llama3.1-8b": (
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
        ),
        ("8.030 B", "3192.9 M"),
    ),
}


@pytest.mark.parametrize("target", TARGETS)
def test_shipped_recipes(tmp_path, target):
    config, (base_size, speculator_size) = TARGETS[target]
    config.save_pretrained(tmp_path)
    for stage in (1, 2):
        recipe = RECIPES / target / f"stage{stage}.yaml"
        report = dry_run(["--config", str(recipe), "--base_model", str(tmp_path), "--dry_run"])
        assert base_size in report["base model"]
        assert speculator_size in report["speculator"]
        n_predict = int(report["speculator"].split()[0])
        rows, positions, width = map(int, re.findall(r"\d+", report["batch"])[:3])
        assert positions == (4096 - 1 if stage == 1 else 256) - n_predict
        assert width == config.hidden_size
        assert report["tokens a step"] == 8 * (8 * 4096 if stage == 1 else 96 * 256)
        # The header's figures are those that are printed, by the launcher that it names.
        text = recipe.read_text()
        hours, gigabytes = re.search(r"estimate of ([\d.]+) hours on 8 H100s, (\d+) GiB each", text).groups()
        memory = report["... with FSDP2" if "fsdp2.yaml" in text else "GiB a GPU in all"]
        assert float(hours) == report["hours, estimated"]
        assert int(gigabytes) == round(memory)
        assert memory < 75  # of 80


def test_the_quickstarts_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no quickstart has left its speculator
    config = LlamaConfig(vocab_size=2048, hidden_size=192, intermediate_size=504, num_hidden_layers=10)
    config.save_pretrained(tmp_path)
    for stage in (1, 2):
        report = dry_run(["--config", str(RECIPES / f"quickstart/stage{stage}.yaml"), "--base_model", str(tmp_path)])
        assert "3 heads" in report["speculator"]


def test_mistakes(tmp_path):
    config = FAMILIES["gpt2"]
    config.save_pretrained(tmp_path)
    command = ["--base_model", str(tmp_path), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    with pytest.raises(ValueError, match="200.*are more than the 128 positions"):
        dry_run([*command, "--sequence_length", "201"])
    with pytest.raises(ValueError, match="Sequences of 4 tokens are too short for 3 heads"):
        dry_run([*command, "--sequence_length", "4"])
    with pytest.raises(ValueError, match="each of the 3 heads"):
        dry_run([*command, "--sequence_length", "40", "--top_k_tokens_per_head", "5", "3"])
