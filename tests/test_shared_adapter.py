"""Streams that share an adapter with the main stream: trained with the base model, and drafting for that alone."""

import copy
import json
from functools import partial
from pathlib import Path

import commands
import pytest
import torch
from drafters import streaming_speculator
from peft import LoraConfig, PeftModel, get_peft_model
from test_drafter_state import SAME, farthest, speculate
from tiny_models import VOCAB, character_tokenizer, prompts, tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from modeling_speculator.context_vectors import read_text
from modeling_speculator.loading import load_speculator, load_speculator_and_base
from modeling_speculator.model_cards.repository import collect
from modeling_speculator.modeling_streaming import StreamingConfig
from modeling_speculator.trainers.objective import Objective
from modeling_speculator.trainers.run_folder import delete_training
from modeling_speculator.trainers.speculator_trainer import check_layers_of_the_base_model


RECIPES = Path(__file__).parents[1] / "recipes"


def shared(model, folder, **config):
    """Streams beside a tiny model, whose adapter lies in a folder, and the model with it."""
    speculator = streaming_speculator(model, shared_adapter=True, **config)
    speculator.save_pretrained(folder)
    return speculator, PeftModel.from_pretrained(copy.deepcopy(model), folder / "adapter").eval()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "phi3"])
@torch.no_grad()
def test_what_is_trained_is_what_peft_runs(family, tmp_path):
    """The adapter within the speculator, beside the plain model, does what peft's does in it."""
    model = tiny_model(family)
    speculator, adapted = shared(model, tmp_path, n_stream_layers=2)
    text = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    read = partial(read_text, text=text, attention_mask=torch.ones_like(text), feature_layers=[0])
    plain, with_it = read(model), read(adapted.base_model.model)
    in_training, in_use = speculator.beside(model), speculator.beside(adapted.base_model.model)
    starts = in_training.with_context(plain.hidden_states, text, plain.features)
    torch.testing.assert_close(
        in_training.speculator.next_token_states[0], with_it.hidden_states, rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(plain.hidden_states, with_it.hidden_states, atol=1e-2)
    others = in_use.with_context(with_it.hidden_states, text, with_it.features)
    torch.testing.assert_close(starts, others, rtol=1e-4, atol=1e-4)
    assert in_use.speculator.next_token_states == ()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_bigcode"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_the_text_is_the_adapted_models(family, cache, tmp_path):
    model = tiny_model(family)
    speculator, adapted = shared(model, tmp_path)
    inputs = prompts()
    expected = adapted.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert expected.tolist() != model.generate(**inputs, max_new_tokens=24, do_sample=False).tolist()
    options = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": cache}
    given = adapted.generate(**inputs, **options, assistant_model=speculator)
    assert given.tolist() == expected.tolist()
    if cache is None:
        oracle, out = speculate(adapted.base_model.model, speculator, inputs)
        assert farthest(oracle, out) < SAME


def test_a_model_without_its_adapter_is_refused(tmp_path):
    model = tiny_model("llama")
    speculator, adapted = shared(model, tmp_path)
    generate = partial(adapted.generate, **prompts(), max_new_tokens=4, assistant_model=speculator)
    with pytest.raises(ValueError, match="runs without it, or with another one"):
        model.generate(**prompts(), max_new_tokens=4, assistant_model=speculator)
    with adapted.disable_adapter(), pytest.raises(ValueError, match="runs without it"):
        generate()
    generate()
    adapted.merge_adapter()
    generate()
    adapted.unmerge_adapter()
    with torch.no_grad():
        adapted.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight.mul_(-1)
    with pytest.raises(ValueError, match="share an adapter with the base model, but mlp.up_proj of Llama"):
        generate()
    other = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    with pytest.raises(ValueError, match="with another one"):
        get_peft_model(copy.deepcopy(model), other).generate(**prompts(), assistant_model=speculator)
    with pytest.raises(ValueError, match="needs an adapter to share"):
        StreamingConfig(vocab_size=VOCAB, emb_dim=32, shared_adapter=True, stream_lora_rank=0)


def test_the_loss_of_the_main_stream(llama):
    """Cross-entropy of what the adapted model says, beside those of the streams."""
    speculator = streaming_speculator(llama, shared_adapter=True)
    text = torch.randint(VOCAB, (2, 14), generator=torch.Generator().manual_seed(0))
    reading = read_text(llama, text[:, :11], torch.ones_like(text[:, :11]), [1])
    labels = text[:, 2:].clone()
    labels[0, :4] = -100
    forward = partial(speculator, reading.hidden_states[:, :10], text[:, 1:], labels[:, :12], base_model=llama)
    objective = Objective(["cross_entropy"], [1.0], [0.1] * 3, [3, 2, 2])
    out = forward(objective=objective, features=reading.features[:, :10])
    cell = speculator.beside(llama).speculator
    cell.with_context(reading.hidden_states[:, :10], text[:, 1:11], reading.features[:, :10])
    logits = llama.get_output_embeddings()(cell.next_token_states[0])
    targets = text[:, 1:11].masked_fill(labels[:, :10] == -100, -100)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected + 0.1 * out.losses.sum())
    (out.loss - 0.1 * out.losses.sum()).backward()  # of the main stream alone
    assert all(weight.grad.abs().sum() > 0 for weight in speculator.speculator.adapters.parameters())
    assert all(weight.grad is None for weight in llama.parameters())


def test_from_training_to_generation(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": "ab cd ef" * 20}) + "\n" for _ in range(40)))
    flags = ("--base_model", tmp_path / "base", "--data_files", tmp_path / "texts.jsonl", "--sequence_length", 24)
    flags += ("--max_steps", 3, "--per_device_train_batch_size", 2, "--report_to", "none", "--validation_fraction", 0)
    flags += ("--method", "streaming", "--n_stream_layers", 1, "--shared_adapter", "true", "--learning_rate", 0.01)
    done = commands.run(RECIPES / "train_speculator.py", *flags, "--output_dir", tmp_path / "streams")
    assert done.returncode == 0, done.stderr
    with_it = AutoModelForCausalLM.from_pretrained(tmp_path / "streams/adapter")  # as peft's adapters are loaded
    expected = with_it.generate(**prompts(), max_new_tokens=12, do_sample=False)
    speculator = load_speculator(str(tmp_path / "streams"), with_it)
    given = with_it.generate(**prompts(), max_new_tokens=12, do_sample=False, assistant_model=speculator)
    assert given.tolist() == expected.tolist()
    speculator, base, _ = load_speculator_and_base(str(tmp_path / "streams"))
    given = base.generate(**prompts(), max_new_tokens=12, do_sample=False, assistant_model=speculator)
    assert given.tolist() == expected.tolist()
    generate = partial(commands.run, RECIPES / "generate.py", "--prompt", "ab cd", "--max_new_tokens", 8)
    done = generate("--base_model", tmp_path / "streams/adapter", "--speculator", tmp_path / "streams")
    assert done.returncode == 0, done.stderr
    done = generate("--base_model", tmp_path / "base", "--speculator", tmp_path / "streams")
    assert "Pass the model with the adapter" in done.stderr


def test_a_repository_holds_the_adapter(tmp_path):
    """For the base model's name on the Hub, whatever folder it was trained in."""
    speculator, _ = shared(tiny_model("llama"), tmp_path / "streams")
    contents, left_out = collect(tmp_path / "streams", "org/streams", base_model="org/base")
    of_peft = json.loads(contents["adapter/adapter_config.json"])
    assert of_peft["base_model_name_or_path"] == "org/base" and of_peft["r"] == speculator.config.stream_lora_rank
    assert contents["adapter/adapter_model.safetensors"].is_file() and "adapter" not in left_out
    (tmp_path / "streams/adapter/adapter_config.json").unlink()
    with pytest.raises(ValueError, match="lacks the adapter of its base model"):
        collect(tmp_path / "streams", "org/streams", base_model="org/base")


def test_it_is_not_trained_beside_another_adapter(tmp_path):
    """Nor beside its own in the base model, where nothing of it would be trained."""
    model = tiny_model("llama")
    speculator, adapted = shared(model, tmp_path)
    speculator.speculator.check_training(model)
    with pytest.raises(ValueError, match="Pass the base model without the streams' own"):
        check_layers_of_the_base_model(speculator, adapted.base_model.model)
    check_layers_of_the_base_model(speculator, adapted.merge_and_unload())


def test_a_training_is_deleted_with_its_adapter(tmp_path):
    shared(tiny_model("llama"), tmp_path)
    delete_training(tmp_path)
    assert not (tmp_path / "adapter").exists()
