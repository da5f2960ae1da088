"""The training script from the command line, both stages, on a tiny base model."""

import random
import re
import subprocess
import sys
from pathlib import Path

import commands
import pytest
from tiny_models import VOCAB, tiny_model, word_tokenizer
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM


ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "recipes/train_speculator.py")
ACCELERATE_LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
ACCELERATE_LAUNCH += ["--config_file", str(ROOT / "recipes/accelerate_configs/single.yaml")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    tiny_model("llama").save_pretrained(folder / "base_model")
    words = [f"word{n}" for n in range(VOCAB)]
    word_tokenizer(words).save_pretrained(folder / "base_model")
    (folder / "text.txt").write_text(" ".join(random.Random(0).choices(words, k=4000)))
    return folder


def train(folder, launcher, *flags):
    arguments = [
        *("--base_model", str(folder / "base_model"), "--data_files", str(folder / "text.txt"), "--use_cpu", "true"),
        *("--save_steps", "2", "--report_to", "none", "--per_device_train_batch_size", "4"),
        *flags,
    ]
    if launcher == "python":
        finished = commands.run(SCRIPT, *arguments)
    else:
        finished = subprocess.run([*ACCELERATE_LAUNCH, SCRIPT, *arguments], capture_output=True, text=True)
    return finished.returncode, finished.stdout + finished.stderr


def test_both_stages(folder):
    stage1, stage2 = str(folder / "stage1"), str(folder / "stage2")
    new = ["--n_predict", "2", "--inner_dim", "16", "--top_k_tokens_per_head", "3", "2", "--n_candidates", "4"]
    options = ["--stage", "1", "--sequence_length", "32", "--output_dir", stage1, *new]
    code, output = train(folder, "python", *options, "--max_steps", "2")
    assert code == 0, output
    code, output = train(folder, "python", *options, "--max_steps", "4")
    assert code == 0, output
    assert f"Resuming from {stage1}/checkpoint-2" in output

    options = ["--stage", "2", "--prompt_length", "8", "--generation_length", "12", "--speculator", stage1]
    code, output = train(folder, "accelerate launch", *options, "--max_steps", "2", "--output_dir", stage2)
    assert code == 0, output
    assert "were not passed to `accelerate launch`" not in output
    assert re.search(
        r"^evaluation at step 2: loss \S+, heads \d+ / \d+ %, \S+ tokens per step, ", output, re.MULTILINE
    )
    assert "  # try it\n  python recipes/generate.py --base_model" in output
    speculator = AutoModel.from_pretrained(stage2)
    assert (speculator.config.n_predict, speculator.config.top_k_tokens_per_head) == (2, [3, 2])
    assert speculator.config.base_model_name_or_path == str(folder / "base_model")


def test_a_new_speculator_and_a_given_one(folder):
    code, output = train(folder, "python", "--speculator", "somewhere", "--n_predict", "2", "--output_dir", "unused")
    assert code != 0
    assert "train_speculator.py: error: ['n_predict'] describe a new speculator" in output


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_base_model(folder, tmp_path, bits):
    pytest.importorskip("bitsandbytes", reason="needs `pip install bitsandbytes`")
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base_model")  # of sizes that can be quantized
    AutoTokenizer.from_pretrained(folder / "base_model").save_pretrained(tmp_path / "base_model")
    options = ["--base_model", str(tmp_path / "base_model"), "--base_model_quantization", bits, "--stage", "2"]
    options += ["--prompt_length", "8", "--generation_length", "12", "--max_steps", "2"]
    code, output = train(folder, "python", *options, "--output_dir", str(tmp_path / "speculator"))
    assert code == 0, output
    assert "tokens per step" in output
