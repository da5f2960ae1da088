"""Which speculator a recipe trains: a new one, one that goes on, an adapter; and base models that have one."""

import copy

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import VOCAB, tiny_model
from trainings import rows, speculator
from transformers import AutoModel, AutoModelForCausalLM

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.trainers import (
    DistillationTrainer,
    ModelArguments,
    SpeculatorTrainer,
    SpeculatorTrainingArguments,
    load_or_create_speculator,
)
from modeling_speculator.trainers.base_model import read


def arguments(folder, **options):
    defaults = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    return SpeculatorTrainingArguments(output_dir=str(folder), **defaults | quiet | options)


def train(folder, model, base_model, stage=2):
    trainer_class = SpeculatorTrainer if stage == 1 else DistillationTrainer
    trainer = trainer_class(model, base_model, arguments(folder), 6, 9, train_dataset=rows(16, 12))
    trainer.train()
    trainer.save_model()
    return trainer


def test_a_new_one_fits_the_base_model(llama):
    args = ModelArguments(base_model="here", n_predict=2, inner_dim=24, top_k_tokens_per_head=[4, 2], n_candidates=3)
    base_model = copy.deepcopy(llama)
    base_model.config.eos_token_id = [2, 5]
    config = load_or_create_speculator(args, base_model).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, [2, 5], None)
    assert (config.vocab_size, config.emb_dim, config.inner_dim) == (VOCAB, 32, 24)
    assert (config.n_predict, config.top_k_tokens_per_head, config.n_candidates) == (2, [4, 2], 3)
    assert config.base_model_name_or_path == "here"
    gated = ModelArguments(base_model="here", method="sum_lstm", tie_weights=True, scale_input=True)
    config = load_or_create_speculator(gated, llama).config
    assert (config.method, config.tie_weights, config.scale_input) == ("sum_lstm", True, True)


def test_one_that_goes_on_is_trained_in_float32_for_its_new_base_model(tmp_path, llama):
    speculator(base_model_name_or_path="before", base_model_revision="c0ffee").half().save_pretrained(tmp_path)
    base_model = copy.deepcopy(llama)
    base_model.config.bos_token_id = 1
    found = load_or_create_speculator(ModelArguments(base_model="x", speculator=str(tmp_path)), base_model)
    assert found.config.bos_token_id == 1
    assert found.dtype == torch.float32
    assert (found.config.base_model_name_or_path, found.config.base_model_revision) == ("x", None)


def test_what_does_not_go_together(tmp_path, llama):
    with pytest.raises(ValueError, match="'n_predict'.*describe a new speculator"):
        load_or_create_speculator(ModelArguments(base_model="x", speculator="y", n_predict=2), llama)
    model = copy.deepcopy(llama)
    model.resize_token_embeddings(VOCAB + 1)
    tied = ModelArguments(base_model="x", speculator=str(tmp_path / "tied"), tie_to_base_model=True)
    speculator(tie_weights=True, inner_dim=32).save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match=f"{VOCAB + 1}, but the speculator has {VOCAB}. Call its `resize_token"):
        load_or_create_speculator(tied, model)
    with pytest.raises(ValueError, match="`lora_rank` adapts a speculator that is there"):
        load_or_create_speculator(ModelArguments(base_model="x", lora_rank=2), llama)
    with pytest.raises(ValueError, match="drop `tie_weights` and `inner_dim`"):
        load_or_create_speculator(ModelArguments(base_model="x", tie_to_base_model=True, inner_dim=24), llama)
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match="holds no model.*Its training has not ended: start it again"):
        load_or_create_speculator(ModelArguments(base_model="x", speculator=str(tmp_path)), llama)


@pytest.mark.parametrize("is_adapter", [False, True])
def test_one_of_another_base_model_is_said_to_be_for_that_one(tmp_path, llama, is_adapter):
    config = MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=24, base_model_name_or_path="org/another")
    MLPSpeculatorPreTrainedModel(config).save_pretrained(tmp_path / "whole")
    if is_adapter:
        model = get_peft_model(AutoModel.from_pretrained(tmp_path / "whole"), LoraConfig(target_modules=["head.0"]))
        model.save_pretrained(tmp_path / "adapter")
    args = ModelArguments(base_model="mine", speculator=str(tmp_path / ("adapter" if is_adapter else "whole")))
    with pytest.raises(ValueError, match="emb_dim=24.*it was made for org/another"):
        load_or_create_speculator(args, llama)


def test_a_language_model_to_go_on_with(tmp_path, llama):
    llama.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a model of type 'llama', no speculator"):
        load_or_create_speculator(ModelArguments(base_model="x", speculator=str(tmp_path)), llama)


@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm"])
def test_tied_to_the_base_model(tmp_path, llama, method):
    args = {"base_model": "x", "method": method, "tie_to_base_model": True}
    model = load_or_create_speculator(ModelArguments(**args), llama)
    for stage in (1, 2):
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        train(tmp_path, model, llama, stage)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(loaded.get_input_embeddings().weight, llama.get_input_embeddings().weight)
        for head in loaded.speculator.head:
            assert torch.equal(head.weight, llama.lm_head.weight)
        still = {name for name, weight in loaded.named_parameters() if torch.equal(weight, before[name])}
        assert {name for name, weight in model.named_parameters() if not weight.requires_grad} == still
        args = {"base_model": "x", "speculator": str(tmp_path), "tie_to_base_model": True}
        model = load_or_create_speculator(ModelArguments(**args), llama)
    untied = tmp_path / "untied"
    speculator().save_pretrained(untied)
    with pytest.raises(ValueError, match="whose heads are tied and as wide as the base model, 32"):
        load_or_create_speculator(ModelArguments(**args | {"speculator": str(untied)}), llama)


def test_an_adapter(tmp_path, llama):
    """Trained, saved, loaded by name, gone on with, merged; the weights that it adapts stay as they are."""
    whole, adapter = tmp_path / "whole", tmp_path / "adapter"
    speculator().save_pretrained(whole)
    args = ModelArguments(base_model="x", speculator=str(whole), lora_rank=2)
    model = load_or_create_speculator(args, llama)
    assert {name.split(".lora_")[0].split(".")[-2] for name, w in model.named_parameters() if w.requires_grad} == {
        "proj",
        "head",
    }
    train(adapter, model, llama)
    assert (adapter / "adapter_model.safetensors").is_file()
    assert not (adapter / "model.safetensors").exists()
    inputs = torch.randn(2, 5, 32), torch.randint(VOCAB, (2, 7))
    logits = model(*inputs).logits
    original = AutoModel.from_pretrained(whole)
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), speculator().parameters(), strict=True))
    assert not torch.allclose(original(*inputs).logits, logits)

    by_name = AutoModel.from_pretrained(adapter)  # its base is named in its config
    assert type(by_name) is MLPSpeculatorPreTrainedModel
    torch.testing.assert_close(by_name(*inputs).logits, logits)
    original.load_adapter(str(adapter))
    torch.testing.assert_close(original(*inputs).logits, logits)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(*inputs).logits, logits, atol=1e-5, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        AutoModel.from_pretrained(tmp_path / "merged")(*inputs).logits, logits, atol=1e-5, rtol=1e-4
    )

    with pytest.raises(ValueError, match="is an adapter, which has"):
        load_or_create_speculator(ModelArguments(base_model="x", speculator=str(adapter), lora_rank=2), llama)
    again = load_or_create_speculator(ModelArguments(base_model="x", speculator=str(adapter)), llama)
    assert isinstance(again, PeftModel)
    torch.testing.assert_close(again(*inputs).logits, logits)
    assert any(weight.requires_grad for weight in again.parameters())

    text = torch.arange(5)[None]
    options = {"attention_mask": torch.ones_like(text), "max_new_tokens": 12, "do_sample": False}
    expected = llama.generate(text, **options)
    for assistant in (by_name, again):
        assert torch.equal(llama.generate(text, **options, assistant_model=assistant), expected)


def test_an_adapter_of_the_gated_cell(tmp_path, llama):
    """All that it trains is read: DDP would stop at what is not."""
    args = {"base_model": "x", "method": "sum_lstm", "tie_weights": True}
    load_or_create_speculator(ModelArguments(**args), llama).save_pretrained(tmp_path / "whole")
    args = ModelArguments(base_model="x", speculator=str(tmp_path / "whole"), lora_rank=2)
    model = load_or_create_speculator(args, llama)
    model(torch.randn(2, 5, 32), torch.randint(VOCAB, (2, 7)), torch.randint(VOCAB, (2, 7))).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("method", ["context", "eagle", "hydra", "medusa", "redrafter", "residual"])
def test_an_adapter_of_every_product(tmp_path, llama, method):
    heads = {"context_heads": 2} if method in ("context", "eagle", "hydra") else {}
    new = ModelArguments(base_model="x", method=method, n_predict=3, **heads)
    load_or_create_speculator(new, llama).save_pretrained(tmp_path)
    model = load_or_create_speculator(ModelArguments(base_model="x", speculator=str(tmp_path), lora_rank=2), llama)
    whole = AutoModel.from_pretrained(tmp_path)
    products = {name for name, part in whole.named_modules() if isinstance(part, torch.nn.Linear)}
    trained = (name.split(".lora_")[0] for name, weight in model.named_parameters() if weight.requires_grad)
    assert {name.removeprefix("base_model.model.") for name in trained} == products


def test_streams_are_adapters_themselves(tmp_path, llama):
    new = ModelArguments(base_model="x", method="streaming", n_predict=3)
    load_or_create_speculator(new, llama).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapters themselves"):
        load_or_create_speculator(ModelArguments(base_model="x", speculator=str(tmp_path), lora_rank=2), llama)


def adapted(base_model):
    torch.manual_seed(1)
    model = get_peft_model(base_model, LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False))
    return model.eval()


def test_a_base_model_is_used_with_its_adapter_on(tmp_path):
    """As a peft model, and loaded from an adapter's folder."""
    plain, text = tiny_model("llama"), torch.randint(VOCAB, (2, 12))
    without = read(plain, text).hidden_states
    plain.save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    for base_model in (model, loaded):
        states = (
            SpeculatorTrainer(speculator(), base_model, arguments(tmp_path)).batch({"input_ids": text}).hidden_states
        )
        assert not torch.allclose(states, without[:, : states.shape[1]])
        torch.testing.assert_close(
            states, read(model.merge_adapter() or model, text).hidden_states[:, : states.shape[1]]
        )
        model.unmerge_adapter()
        trainer = train(tmp_path / "out", speculator(), base_model)
        assert all(weight.grad is None for weight in base_model.parameters())
        assert isinstance(trainer.train_dataset, datasets.Dataset)
