"""Speculative Streaming: streams beside the nodes of a step, and along a text."""

import pytest
import torch
from drafters import streaming_speculator
from peft import LoraConfig, get_peft_model
from test_drafter_state import SAME, farthest, speculate
from tiny_models import VOCAB, prompts, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_speculator import guests, streams
from modeling_speculator.context_vectors import read_text
from modeling_speculator.modeling_streaming import StreamingConfig, StreamingSpeculator
from modeling_speculator.trainers import ModelArguments, load_or_create_speculator


@pytest.mark.parametrize("n_stream_layers", [1, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_one_layer_or_all(family, attention, n_stream_layers):
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    oracle, out = speculate(model, streaming_speculator(model, n_stream_layers=n_stream_layers), prompts())
    assert farthest(oracle, out) < SAME


def test_a_long_text_in_parts(llama, monkeypatch):
    """Of some places at a time, computed again for the backward where that would be large: the same, gradients too."""
    text, results = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0)), []
    reading = read_text(llama, text[:, :-1], torch.ones_like(text[:, :-1]), [1])
    segments = torch.tensor([[1] * 20 + [2] * 19, [0] * 5 + [1] * 34])
    for rows, kept in ((1000, 2**32), (9, 2**32), (9, 0)):
        monkeypatch.setattr(streams, "LEAST_ROWS", rows)
        monkeypatch.setattr(streams, "KEPT_BYTES", kept)
        speculator = streaming_speculator(llama)
        starts = speculator.beside(llama).with_context(reading.hidden_states, text[:, 1:], reading.features, segments)
        starts.square().sum().backward()
        results.append([starts, *(weight.grad for weight in speculator.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)
    assert all(weight.grad is None for weight in llama.parameters())


def test_by_hand(llama):
    """Stream after stream through the last layer, each with the keys of its place and of the streams before it."""
    speculator = streaming_speculator(llama, stream_lora_rank=0)
    text = torch.randint(64, (1, 7), generator=torch.Generator().manual_seed(0))
    reading = read_text(llama, text, torch.ones_like(text), [1])
    found = speculator.beside(llama).with_context(reading.hidden_states, text, reading.features)[0, 4].view(3, 32)
    embeddings, layer, place = speculator.speculator.embeddings, llama.model.layers[1], 4
    states = torch.cat([reading.features[:, : place + 1], reading.features[:, place] + embeddings[None]], dim=1)
    positions = torch.tensor([[0, 1, 2, 3, 4, 4, 4, 4]])
    mask = torch.full((8, 8), -torch.inf).triu(1)[None, None]
    angles = llama.model.rotary_emb(states, positions)
    leaving = layer(states, attention_mask=mask, position_ids=positions, position_embeddings=angles)
    leaving = leaving[0] if isinstance(leaving, tuple) else leaving
    torch.testing.assert_close(found, llama.model.norm(leaving)[0, place + 1 :], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_models_own_rows_are_not_adapted(llama):
    """Adapters that add millions change what streams say, and nothing else."""
    speculator = streaming_speculator(llama)
    for adapter in speculator.speculator.adapters.parameters():
        adapter.mul_(1000)
    expected = llama.generate(**prompts(), max_new_tokens=24, do_sample=False)
    given = llama.generate(**prompts(), max_new_tokens=24, do_sample=False, assistant_model=speculator)
    assert given.tolist() == expected.tolist()


def test_sizes():
    """What an adapter of rank 8 adds to the last quarter of Llama-2-7B, and the streams themselves."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
        speculator = StreamingSpeculator(StreamingConfig(vocab_size=32000, emb_dim=4096, n_streams=4))
        speculator.speculator.fit(model)
    assert speculator.config.n_stream_layers == 8 and speculator.config.first_layer == 24
    assert speculator.speculator.embeddings.numel() == 4 * 4096
    adapters = sum(weight.numel() for weight in speculator.speculator.adapters.parameters())
    assert adapters == 8 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008))


def test_linear_layers_that_streams_adapt():
    fused = guests.linear_layers(tiny_model("phi3").model.layers[0])
    assert set(fused) == {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
    turned = guests.linear_layers(tiny_model("gpt2").transformer.h[0])
    assert turned["attn.c_attn"] == (32, 96)
    assert not any("mlp" in name for name in guests.linear_layers(tiny_model("mixtral").model.layers[0]))


@pytest.mark.parametrize("n_streams", [1, 2, 5])
def test_fewer_streams_or_more(llama, n_streams):
    """The paper has at most 4, but nothing depends on it."""
    speculator = streaming_speculator(llama, n_streams=n_streams)
    assert speculator.config.n_streams == speculator.config.n_predict == n_streams
    expected = llama.generate(**prompts(), max_new_tokens=24, do_sample=False)
    given = llama.generate(**prompts(), max_new_tokens=24, do_sample=False, assistant_model=speculator)
    assert given.tolist() == expected.tolist()


def test_other_streams_on_the_same_model(llama):
    """Hooks are shared by all calls at work: those of layers that only another's streams adapt let these be."""
    expected = llama.generate(**prompts(), max_new_tokens=24, do_sample=False)
    other = streaming_speculator(llama, n_stream_layers=2).speculator.streams
    for rank in (0, 4):
        speculator = streaming_speculator(llama, stream_lora_rank=rank)
        with guests.guests_allowed(llama, other.adapted):
            oracle, out = speculate(llama, speculator, prompts())
            assert farthest(oracle, out) < SAME
            given = llama.generate(**prompts(), max_new_tokens=24, do_sample=False, assistant_model=speculator)
        assert given.tolist() == expected.tolist()


def test_beside_an_adapted_base_model():
    """Streams adapt what peft's layers make as a whole, whatever the adapter is called."""
    model = tiny_model("llama")
    speculator = streaming_speculator(model)
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, adapter, adapter_name="my-lora")
    assert guests.linear_layers(model.model.layers[1]).keys() == speculator.config.adapted.keys()
    expected = adapted.generate(**prompts(), max_new_tokens=24, do_sample=False)
    given = adapted.generate(**prompts(), max_new_tokens=24, do_sample=False, assistant_model=speculator)
    assert given.tolist() == expected.tolist()
    oracle, out = speculate(model, speculator, prompts())
    assert farthest(oracle, out) < SAME


def test_no_gradient_of_the_base_model_in_any_thread(llama):
    """Each of two readings that overlap wants the weights frozen; the first to end does not thaw them."""
    with streams.frozen(llama):
        with streams.frozen(llama):
            assert not any(weight.requires_grad for weight in llama.parameters())
        assert not any(weight.requires_grad for weight in llama.parameters())
    assert all(weight.requires_grad for weight in llama.parameters())


def test_refused(llama):
    shape = {"vocab_size": VOCAB, "emb_dim": 32}
    with pytest.raises(ValueError, match="`n_predict` must be an integer of at least 1"):
        StreamingConfig(**shape, n_streams=0)
    with pytest.raises(ValueError, match="`stream_lora_rank` must be an integer"):
        StreamingConfig(**shape, stream_lora_rank=-1)
    with pytest.raises(ValueError, match="drop `inner_dim`"):
        StreamingConfig(**shape, tie_weights=True)
    with pytest.raises(ValueError, match="more than the 2 layers of LlamaForCausalLM"):
        streaming_speculator(llama, n_stream_layers=3)
    speculator = streaming_speculator(llama)
    deeper = LlamaForCausalLM(LlamaConfig(**llama.config.to_dict() | {"num_hidden_layers": 3}))
    deeper.set_input_embeddings(llama.get_input_embeddings())
    with pytest.raises(ValueError, match="made for a base model of 2 layers, but LlamaForCausalLM has 3"):
        deeper.generate(**prompts(), assistant_model=speculator)
    wider = LlamaForCausalLM(LlamaConfig(**llama.config.to_dict() | {"intermediate_size": 80}))
    wider.set_input_embeddings(llama.get_input_embeddings())
    with pytest.raises(ValueError, match=r"adapt mlp.gate_proj, .*, which LlamaForCausalLM does not have"):
        wider.generate(**prompts(), assistant_model=speculator)
    checkpointing = tiny_model("llama")
    checkpointing.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"allows no cache. Call `eval\(\)` first"):
        speculator.speculator.check_base_model(checkpointing.train())
    with pytest.raises(ValueError, match="takes no mask of streams"):
        checkpointing.config._attn_implementation = "flash_attention_2"
        speculator.speculator.check_base_model(checkpointing.eval())
    with pytest.raises(ValueError, match="`method: residual` has no n_stream_layers"):
        load_or_create_speculator(ModelArguments(base_model="x", method="residual", n_stream_layers=1), llama)
