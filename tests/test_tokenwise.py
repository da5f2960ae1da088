"""Base models that look at all the tokens of a forward together: refused, but where each forward has one token."""

import copy

import pytest
import torch
from drafters import Oracle
from peft import LoraConfig, PeftModel, get_peft_model
from test_bad_requests import refuses, speculator
from tiny_models import VOCAB, word_tokenizer
from torch.ao import quantization
from transformers import pipeline

from modeling_speculator.tokenwise import scaled_together


OPTIONS = {"do_sample": False, "max_new_tokens": 40}
INVOCATION = [5, 6]
PROMPT = torch.tensor([[1, 2, 3, 4, *INVOCATION, 7]])
SCALED = "one scale for all tokens of a forward.*n_candidates = 0"
INVOKED = "adapter, 'invoked', that acts on the last tokens of a forward.*n_candidates = 0"


def quantized(model, **options):
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    return quantization.quantize_dynamic(copy.deepcopy(model), **options)


def activated(model) -> PeftModel:
    """With an adapter that acts from its invocation on, and one of another kind, off."""

    def lora(**options):
        options |= {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        return LoraConfig(r=4, **options)

    torch.manual_seed(0)
    invoked = lora(alora_invocation_tokens=INVOCATION)
    adapted = get_peft_model(copy.deepcopy(model), invoked, adapter_name="invoked")
    adapted.add_adapter("plain", lora())
    return adapted.eval()


def text_of(model, **options):
    return model.generate(input_ids=PROMPT, **OPTIONS, **options)


def assert_same_text(model, oracle_model=None, n_candidates=5, **options):
    expected = text_of(model, **options)
    oracle = Oracle(oracle_model or model, expected, p_right=0.7, n_candidates=n_candidates)
    assert text_of(model, **options, assistant_model=oracle).tolist() == expected.tolist()


def test_one_scale_for_all_activations(llama):
    model = quantized(llama)
    refuses(model, SCALED)
    for extra in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}):
        assert_same_text(model, n_candidates=0, **extra)
    assert_same_text(quantized(llama, dtype=torch.float16))  # of the weights alone


def test_in_one_layer_only(llama):
    model = copy.deepcopy(llama)
    model.model.layers[1].mlp = quantized(model.model.layers[1].mlp)
    refuses(model, SCALED)


def test_rows_that_end_apart(llama):
    """Their padding has a say in the scale of the others: it is run on as in `generate`."""
    model = quantized(llama)
    text = text_of(model)
    drafter = Oracle(model, text, n_candidates=0)
    rows = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]])
    ends = [row[8].item() for row in model.generate(rows, **OPTIONS)]  # of one row or the other, in its middle
    for extra in ({}, {"eos_token_id": ends[:1]}, {"eos_token_id": ends[1:]}, {"cache_implementation": "static"}):
        options = OPTIONS | {"pad_token_id": 5, "eos_token_id": ends[:1]} | extra
        expected = model.generate(rows, **options)
        assert model.generate(rows, **options, assistant_model=drafter).tolist() == expected.tolist(), extra


def test_layers_that_are_trained_for_quantization():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    trained = quantization.prepare_qat(model.train()).eval()
    assert "FakeQuantize" in scaled_together(trained)
    trained.apply(quantization.disable_observer)  # whose scales are constants
    assert scaled_together(trained) is None


class PerTensor:
    pass


class Weight(torch.nn.Parameter):
    """As torchao's: it holds what is to be done to activations."""


def test_weights_that_quantize_activations(llama):
    model = copy.deepcopy(llama)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = Weight(layer.weight.detach())
    layer.weight.act_quant_kwargs = type("Kwargs", (), {"granularity": PerTensor()})()
    refuses(model, SCALED)
    layer.weight.act_quant_kwargs.granularity = None
    assert_same_text(model)


def test_an_adapter_that_is_invoked(llama):
    model = activated(llama)
    plain = text_of(llama)
    assert text_of(model).tolist() != plain.tolist()
    base = model.get_base_model()
    with pytest.raises(ValueError, match=INVOKED):
        assert_same_text(model, base)
    for extra in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}):
        assert_same_text(model, base, n_candidates=0, **extra)
    with model.disable_adapter():
        assert text_of(model).tolist() == plain.tolist()
        assert_same_text(model, base)
    model.set_adapter("plain")
    assert text_of(model).tolist() != plain.tolist()
    assert_same_text(model, base)


def test_several_adapters(llama):
    model = activated(llama)
    base = model.get_base_model()
    model.base_model.set_adapter(["invoked", "plain"])
    with pytest.raises(ValueError, match=INVOKED):
        assert_same_text(model, base)
    model.set_adapter("plain")
    rows = PROMPT.repeat(2, 1)
    for names, right in ((["plain", "__base__"], True), (["plain", "invoked"], False)):
        options = OPTIONS | {"adapter_names": names}  # each row has its own
        expected = model.generate(input_ids=rows, **options)
        oracle = Oracle(base, expected, p_right=0.7)
        if right:
            assert model.generate(input_ids=rows, **options, assistant_model=oracle).tolist() == expected.tolist()
        else:
            with pytest.raises(ValueError, match=INVOKED):
                model.generate(input_ids=rows, **options, assistant_model=oracle)


def test_an_adapter_inside_of_a_model(llama):
    model = copy.deepcopy(llama)
    adapter = LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=INVOCATION)
    model.model.layers = get_peft_model(model.model.layers, adapter, adapter_name="invoked").base_model.model
    refuses(model, INVOKED)


def test_the_base_model_of_a_pipeline(llama):
    tokenizer = word_tokenizer([f"word{n}" for n in range(VOCAB)])
    generator = pipeline("text-generation", model=activated(llama), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=INVOKED):
        generator("word1 word5 word6", assistant_model=speculator(), **OPTIONS)
