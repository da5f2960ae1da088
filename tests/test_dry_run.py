"""A dry run of every shipped recipe, on nothing but a config.json of the true shape."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES
from transformers import (
    Gemma3Config,
    Gemma3TextConfig,
    GPTBigCodeConfig,
    GptOssConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from modeling_speculator.trainers import dry_run


RECIPES = Path(__file__).parents[1] / "recipes"
LLAMA_2_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
TARGETS = {  # config, and parameters of base model and speculator (of the published checkpoints)
    "llama2-7b": (
        LlamaConfig(max_position_embeddings=4096),
        ("6.738 B", "836.8 M"),
    ),
    "llama2-13b": (LlamaConfig(**LLAMA_2_13B, max_position_embeddings=4096), ("13.016 B", "841.0 M")),
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
        options = ["--base_model", str(tmp_path), "--dry_run", "--dry_run_gpus", "8"]
        report = dry_run(["--config", str(recipe), *options])
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
        assert report["for"].startswith("8 x ") and report["warnings"] == []


TODAYS = {  # config, and parameters of the base model
    "qwen3-8b": (
        Qwen3Config(
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_key_value_heads=8,
            max_position_embeddings=40960,
        ),
        "8.191 B",
    ),
    "granite-4.0-micro": (
        GraniteMoeHybridConfig(
            vocab_size=100352,
            hidden_size=2560,
            intermediate_size=8192,
            shared_intermediate_size=8192,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=8,
            num_local_experts=0,
            num_experts_per_tok=0,
            layer_types=["attention"] * 40,
            tie_word_embeddings=True,
            max_position_embeddings=131072,
        ),
        "3.403 B",
    ),
    "mistral-small-24b": (
        MistralConfig(
            vocab_size=131072,
            hidden_size=5120,
            intermediate_size=32768,
            num_hidden_layers=40,
            num_key_value_heads=8,
            head_dim=128,
            sliding_window=None,
            max_position_embeddings=32768,
        ),
        "23.572 B",
    ),
    "gemma-3-12b": (
        Gemma3Config(
            text_config=Gemma3TextConfig(
                vocab_size=262208,
                hidden_size=3840,
                intermediate_size=15360,
                num_hidden_layers=48,
                num_attention_heads=16,
                num_key_value_heads=8,
                head_dim=256,
                sliding_window=1024,
                max_position_embeddings=131072,
            )
        ),
        "11.862 B",  # with a vision tower that is smaller than its own
    ),
    "gpt-oss-20b": (GptOssConfig(num_hidden_layers=24, num_local_experts=32), "20.915 B"),
}


@pytest.mark.parametrize("target", TODAYS)
def test_recipes_of_a_context_speculator(tmp_path, target):
    """One stage; its header says what is printed."""
    config, size = TODAYS[target]
    config.save_pretrained(tmp_path)
    recipe = RECIPES / target / "context.yaml"
    report = dry_run(["--config", str(recipe), "--base_model", str(tmp_path), "--dry_run", "--dry_run_gpus", "8"])
    assert size in report["base model"] and report["warnings"] == []
    said = re.search(r"of ([\d.]+) hours on 8 H100s, (\d+) GiB each, for ([\d.]+ M) parameters", recipe.read_text())
    memory = report["... with FSDP2"]
    assert (float(said[1]), int(said[2])) == (report["hours, estimated"], round(memory)) and memory < 75
    assert said[3] in report["speculator"]


def test_the_quickstarts_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no quickstart has left its speculator
    config = LlamaConfig(vocab_size=2048, hidden_size=192, intermediate_size=504, num_hidden_layers=10)
    config.save_pretrained(tmp_path)
    corpus = tmp_path / "outputs/quickstart/corpus"
    corpus.mkdir(parents=True)
    (corpus / "train.jsonl").write_text('{"text": "import this"}\n')
    for stage in (1, 2):
        report = dry_run(["--config", str(RECIPES / f"quickstart/stage{stage}.yaml"), "--base_model", str(tmp_path)])
        assert "3 heads" in report["speculator"]


@pytest.fixture
def command(tmp_path):
    """A recipe on a base model of a family, with a table of 128 positions or with rotary ones."""

    def command_(family: str, *flags) -> list[str]:
        folder = tmp_path / family
        FAMILIES[family].save_pretrained(folder)
        (tmp_path / "text.txt").write_text("a b c")
        models = ["--base_model", str(folder), "--inner_dim", "16", "--output_dir", str(tmp_path / "new")]
        return [*models, "--data_files", str(tmp_path / "*.txt"), "--use_cpu", "true", *map(str, flags)]

    return command_


SHORT = ("--sequence_length", 40, "--prompt_length", 8, "--generation_length", 12, "--max_steps", 5)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--sequence_length", 201), "200.*are more than the 128 positions"),
        (("--stage", 2, "--prompt_length", 64, "--generation_length", 65), "129.*are more than the 128 positions"),
        # Nothing is trained on so many tokens, but evaluated.
        (("--prompt_length", 64, "--generation_length", 256), "296.*are more than the 128 positions"),
        (("--sequence_length", 4), "Sequences of 4 tokens are too short for 3 heads"),
        (("--top_k_tokens_per_head", 5, 3), "each of the 3 heads"),
        (("--data_files", "nowhere/*.jsonl"), "`data_files` that don't exist: .*nowhere"),
        (("--dataset", "org/texts"), "Name a `dataset` or `data_files`"),
        (("--speculator", "outputs/nowhere/stage1"), "no folder 'outputs/nowhere/stage1' here, and it is no name"),
        (("--base_model", "outputs/nowhere"), "no folder 'outputs/nowhere' here, and the Hub, .* can't be reached"),
        (("--max_steps", -5), "`max_steps` must be at least 1, or -1 .*is -5"),
        (("--max_steps", 0), "`max_steps` must be at least 1"),
        (("--per_device_train_batch_size", 0), "`per_device_train_batch_size` must be between 1"),
        (("--validation_fraction", 1.5), "`validation_fraction` must be from 0"),
        (("--dry_run_gpus", 0), "`dry_run_gpus` must be between 1"),
        (("--base_model_dtype", "float31"), "A dtype is .*not 'float31'"),
    ],
)
def test_mistakes(command, flags, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        dry_run(command("gpt2", *SHORT, *flags))
    assert "\n" not in str(error.value)


def test_a_speculator_that_starts_from_another_kind_of_model(command, tmp_path):
    with pytest.raises(ValueError, match="gpt2 is a model of type 'gpt2', no speculator"):
        dry_run(command("gpt2", *SHORT, "--speculator", tmp_path / "gpt2"))


def test_warnings(command, capsys):
    """What can be trained, but hardly on purpose."""
    assert dry_run(command("llama", *SHORT))["warnings"] == []
    (longer,) = dry_run(command("llama", *SHORT, "--sequence_length", 200))["warnings"]
    assert "Texts of 199 tokens are longer than the 128" in longer
    (larger,) = dry_run(command("llama", *SHORT, "--inner_dim", 512))["warnings"]
    assert "The speculator has" in larger and "costs more than it saves" in larger
    assert f"WARNING: {larger}" in capsys.readouterr().out


def test_which_machine_it_is_for(command, monkeypatch):
    assert dry_run(command("llama", *SHORT, "--dry_run_gpus", 3))["for"].startswith("3 x ")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    report = dry_run(command("llama", *SHORT))
    assert report["for"] == "8 x H100 (there is no GPU here)"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert dry_run(command("llama", *SHORT))["for"] == "2 x a GPU"
    assert dry_run(command("llama", *SHORT))["sequences a step"] * 4 == report["sequences a step"]


def test_epochs_in_place_of_steps(command):
    report = dry_run(command("llama", *SHORT, "--max_steps", -1, "--num_train_epochs", 2))
    assert "those of 2 epochs" in report["steps"]
    assert report["hours, estimated"] == report["tokens"] == "not known"
