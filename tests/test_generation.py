"""The theorem: with any speculator, greedy output is the base model's own, token for token."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from drafters import Oracle
from tiny_models import FAMILIES, HIDDEN, VOCAB, tiny_model, word_tokenizer
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

import modeling_speculator
from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.attention import tree_attention_forward
from modeling_speculator.cache import SpeculativeCache
from modeling_speculator.trainers import SpeculatorTrainer, SpeculatorTrainingArguments


def random_speculator(seed=0, **config):
    torch.manual_seed(seed)
    config = {"vocab_size": VOCAB, "emb_dim": HIDDEN, "n_predict": 3} | config
    return MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(**config)).eval()


def prompt(length, seed=0):
    return torch.randint(1, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def generate(model, input_ids, speculator=None, **kwargs):
    kwargs = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 24} | kwargs
    return model.generate(input_ids, assistant_model=speculator, **kwargs)


def assert_same_text(model, input_ids, speculator, **kwargs):
    expected = generate(model, input_ids, **kwargs).sequences
    out = generate(model, input_ids, speculator, **kwargs)
    assert out.sequences.tolist() == expected.tolist()
    emitted = (expected.shape[1] - input_ids.shape[1]) * len(input_ids)
    assert out.speculation.tokens <= emitted - len(input_ids)
    return out


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_random_speculator(family, attn_implementation):
    model = tiny_model(family, attn_implementation)
    expected = generate(model, prompt(7)).sequences.tolist()
    for n_candidates in (0, 1, 5):
        out = generate(model, prompt(7), random_speculator(n_candidates=n_candidates))
        assert out.sequences.tolist() == expected
        assert out.speculation.tokens == 23


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_oracle_emits_all_heads_and_the_bonus_token(family, attn_implementation):
    model = tiny_model(family, attn_implementation)
    text = generate(model, prompt(5), max_new_tokens=25).sequences
    out = assert_same_text(model, prompt(5), Oracle(model, text), max_new_tokens=25)
    assert out.speculation.tokens_per_step == 4
    assert out.speculation.accepted_per_position == [1, 1, 1]
    assert out.speculation.steps == 6  # 1 token of the prefill, then 6 * 4


def test_always_wrong_speculator(family):
    model = tiny_model(family)
    text = generate(model, prompt(5)).sequences
    out = assert_same_text(model, prompt(5), Oracle(model, text, p_right=0.0))
    assert out.speculation.tokens_per_step == 1
    assert out.speculation.accepted_per_position == [0, 0, 0]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_every_accepted_length_on_every_branch(family, attn_implementation):
    model = tiny_model(family, attn_implementation)
    text = generate(model, prompt(5), max_new_tokens=70).sequences
    oracle = Oracle(model, text, p_right=0.7)
    shares = assert_same_text(model, prompt(5), oracle, max_new_tokens=70).speculation.accepted_per_position
    assert 1 > shares[0] > shares[1] > shares[2] > 0  # accepted lengths 0, 1, 2 and 3 all occurred
    assert set(oracle.right_branches) == set(range(5))


@pytest.mark.parametrize("dials", [{}, {"n_tree_nodes": 6}, {"n_tree_nodes": 30}])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_speculator(llama, dials, broken):
    for head in range(3):
        speculator = random_speculator(**dials)
        with torch.no_grad():
            speculator.speculator.head[head].weight[7] = broken
        assert_same_text(llama, prompt(6), speculator, max_new_tokens=40)


@pytest.mark.parametrize("dials", [{}, {"n_tree_nodes": 4}])
@pytest.mark.parametrize("n_heads", [1, 2, 3])
def test_fewer_heads(llama, n_heads, dials):
    out = assert_same_text(llama, prompt(6), random_speculator(**dials, n_heads=n_heads), max_new_tokens=40)
    assert out.speculation.drafted_tokens > 0
    assert max(out.speculation.emitted_per_step) <= n_heads + 1


@pytest.mark.parametrize("n_tree_nodes", [1, 4, 15, 50])
def test_trees_of_the_best_nodes(llama, n_tree_nodes):
    out = assert_same_text(llama, prompt(6), random_speculator(n_tree_nodes=n_tree_nodes), max_new_tokens=40)
    assert out.speculation.drafted_tokens == out.speculation.steps * n_tree_nodes


def test_trained_speculator(llama, tmp_path):
    """On the text that it was trained on it is right most of the time, and never changes a token."""
    text = generate(llama, prompt(5), max_new_tokens=60).sequences
    speculator = random_speculator()
    args = SpeculatorTrainingArguments(
        output_dir=str(tmp_path), max_steps=60, learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    SpeculatorTrainer(speculator, llama, args, train_dataset=Dataset.from_dict({"input_ids": text.tolist()})).train()
    out = assert_same_text(llama, prompt(5), speculator.eval(), max_new_tokens=60)
    assert out.speculation.tokens_per_step > 3
    assert_same_text(llama, prompt(5, seed=1), speculator, max_new_tokens=60)


def test_real_model(shared):
    model = AutoModelForCausalLM.from_pretrained(shared / "data/stories260K-hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/stories260K-hf")
    for start in ("once upon a time", "lily and ben", "the"):
        input_ids = tokenizer(start, return_tensors="pt").input_ids
        text = generate(model, input_ids, max_new_tokens=150).sequences
        oracle = Oracle(model, text, p_right=0.7)
        out = assert_same_text(model, input_ids, oracle, max_new_tokens=150)
        assert out.speculation.tokens_per_step > 1.5


@pytest.mark.parametrize("prompt_length", [1, 2, 9])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 6])
def test_budget_ends_in_mid_step(llama, prompt_length, max_new_tokens):
    input_ids = prompt(prompt_length)
    text = generate(llama, input_ids, max_new_tokens=12).sequences
    out = assert_same_text(llama, input_ids, Oracle(llama, text), max_new_tokens=max_new_tokens)
    assert out.speculation.tokens == max_new_tokens - 1
    assert out.speculation.steps == -(-(max_new_tokens - 1) // 4)
    if max_new_tokens == 1:
        assert out.speculation.tokens_per_step is None


@pytest.mark.parametrize("place", range(9))
def test_end_of_sequence_inside_an_accepted_run(llama, place):
    input_ids = prompt(4)
    text = generate(llama, input_ids, max_new_tokens=12).sequences
    eos = [int(text[0, 4 + place]), VOCAB - 1]
    out = assert_same_text(llama, input_ids, Oracle(llama, text), max_new_tokens=12, eos_token_id=eos)
    first = text[0, 4:].tolist().index(eos[0])
    assert out.sequences.shape[1] == 4 + first + 1
    assert out.speculation.tokens == first


def test_statistics_count_what_the_end_cut(llama):
    text = generate(llama, prompt(4), max_new_tokens=12).sequences
    out = assert_same_text(llama, prompt(4), Oracle(llama, text), max_new_tokens=7)  # 1, then 4, then 2 of 4
    assert out.speculation.steps == 2
    assert out.speculation.accepted_per_position == [1, 0.5, 0.5]
    assert out.speculation.drafted_tokens == 2 * 15  # five branches that share nothing


def test_positions_up_to_the_last(family):
    model = tiny_model(family)
    text = generate(model, prompt(100), max_new_tokens=29).sequences  # the last token has no position, and needs none
    oracle = Oracle(model, text[:, :128])
    assert_same_text(model, prompt(100), oracle, max_new_tokens=29)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_left_padded_prompts(family):
    model = tiny_model(family)
    lengths = [9, 4, 1]
    input_ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        input_ids[row, 9 - length :], mask[row, 9 - length :] = prompt(length, seed=row)[0], 1
    text = generate(model, input_ids, attention_mask=mask, max_new_tokens=40).sequences
    text_mask = torch.nn.functional.pad(mask, (0, 40), value=1)
    oracle = Oracle(model, text, text_mask, p_right=0.7)
    out = generate(model, input_ids, oracle, attention_mask=mask, max_new_tokens=40)
    assert out.sequences.tolist() == text.tolist()
    for row in out.speculation.per_sequence:
        assert row.tokens == 39
        assert set(row.emitted_per_step) == {1, 2, 3, 4}  # padded or not, the oracle is handed the right vectors
    assert out.speculation.steps == sum(row.steps for row in out.speculation.per_sequence)
    assert out.past_key_values.get_seq_length() == 9 + 40 - 1
    eos = int(text[0, 9 + 11])
    options = {"attention_mask": mask, "max_new_tokens": 40, "eos_token_id": eos, "do_sample": False}
    expected = model.generate(input_ids, **options)
    assert model.generate(input_ids, assistant_model=oracle, **options).tolist() == expected.tolist()


def test_prompt_in_chunks(llama):
    text = generate(llama, prompt(9)).sequences
    assert_same_text(llama, prompt(9), Oracle(llama, text, p_right=0.7), prefill_chunk_size=4)


def test_returned_cache_is_the_base_models(llama):
    expected = generate(llama, prompt(6)).past_key_values
    text = generate(llama, prompt(6)).sequences
    cache = generate(llama, prompt(6), Oracle(llama, text, p_right=0.7)).past_key_values
    assert cache.get_seq_length() == expected.get_seq_length() == 6 + 23
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)
        assert not ours.keys.is_inference()


def test_a_cache_is_freed_with_its_call(llama):
    gc.collect()
    gc.disable()
    try:
        generate(llama, prompt(6), random_speculator(), return_dict_in_generate=False)
        assert not any(isinstance(thing, SpeculativeCache) for thing in gc.get_objects())
    finally:
        gc.enable()


def test_attention_kernels_of_another_layout(llama, monkeypatch):
    """CUDA's memory-efficient kernel returns (batch, nodes, heads, dim) in memory."""
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def transposed(*args, **kwargs):
        return sdpa(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr("modeling_speculator.attention.F.scaled_dot_product_attention", transposed)
    assert_same_text(llama, prompt(6), random_speculator())


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_that_of_transformers(nodes, kv_heads):
    """In memory, too: a model may take a `view` of it."""
    torch.manual_seed(0)
    module = SimpleNamespace(num_key_value_groups=4 // kv_heads, is_causal=True)
    query, key, value = torch.randn(2, 4, nodes, 8), *torch.randn(2, 2, kv_heads, 5, 8)
    mask = torch.where(torch.rand(2, 1, nodes, 5) < 0.3, torch.finfo(torch.float32).min, 0.0)
    ours, _ = tree_attention_forward(module, query, key, value, mask)
    theirs, _ = AttentionInterface()["sdpa"](module, query, key, value, mask)
    torch.testing.assert_close(ours, theirs)
    assert ours.stride() == theirs.stride()


def test_masks_of_any_dtype(llama):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    expected = generate(llama, prompt(6), attention_mask=mask).sequences
    for dtype in (torch.float32, torch.bool, torch.int32):
        out = generate(llama, prompt(6), random_speculator(), attention_mask=mask.to(dtype))
        assert out.sequences.tolist() == expected.tolist()


def test_text_generation_pipeline(llama):
    tokenizer = word_tokenizer([f"word{n}" for n in range(VOCAB)])
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = pipeline("text-generation", model=llama, tokenizer=tokenizer)("word3 word4", **options)
    plain = pipeline("text-generation", model=llama, tokenizer=tokenizer)
    assert plain("word3 word4", assistant_model=random_speculator(), **options) == expected
    # The constructor wants a tokenizer for every assistant with other special tokens; the loop has no use for it.
    # One that names none is such, unless the base model has none.
    model = copy.deepcopy(llama)
    model.config.bos_token_id, model.config.eos_token_id = 1, [2, 5]
    with pytest.raises(ValueError, match="You should pass the assistant tokenizer"):
        pipeline("text-generation", model=model, tokenizer=tokenizer, assistant_model=random_speculator())
    assistant = {"assistant_model": random_speculator(), "assistant_tokenizer": tokenizer}
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, **assistant)
    assert generator("word3 word4", **options) == expected
    speculator = random_speculator()
    speculator.config.take_special_tokens(model.config)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, assistant_model=speculator)
    assert generator("word3 word4", **options) == expected
    with pytest.raises(ValueError, match=r"a name, 'org/speculator'.*AutoModel.from_pretrained\('org/speculator'\)"):
        plain("word3 word4", assistant_model="org/speculator", **options)


def test_base_model_is_left_as_it_was(llama):
    before = copy.deepcopy(llama.state_dict())
    hooks = [dict(module._forward_hooks) for module in llama.modules()]
    implementation = llama.config._attn_implementation
    with pytest.raises(RuntimeError, match="boom"):

        class Broken(Oracle):
            def generate_candidates(self, hidden_states, input_ids):
                raise RuntimeError("boom")

        generate(llama, prompt(6), Broken(llama, prompt(6)))
    generate(llama, prompt(6), random_speculator())
    assert llama.config._attn_implementation == implementation
    assert [dict(module._forward_hooks) for module in llama.modules()] == hooks
    assert not any(module._forward_pre_hooks for module in llama.modules())
    assert all(torch.equal(value, before[key]) for key, value in llama.state_dict().items())
    assert not any(parameter.is_inference() for parameter in llama.parameters())


def test_output_can_be_used_in_training(llama):
    out = generate(llama, prompt(6), random_speculator())
    assert not out.sequences.is_inference()
    loss = llama(out.sequences, labels=out.sequences, use_cache=False).loss
    loss.backward()
    llama.zero_grad()


def test_two_threads_share_a_base_model(llama):
    """Each with its own speculator, and a third that generates plainly."""
    expected = {seed: generate(llama, prompt(5 + seed, seed), max_new_tokens=100).sequences for seed in range(3)}
    oracles = [Oracle(llama, expected[seed], p_right=0.7) for seed in range(2)]

    def run(seed):
        speculator = oracles[seed] if seed < 2 else None
        return [
            generate(llama, prompt(5 + seed, seed), speculator, max_new_tokens=100).sequences.tolist()
            for _ in range(3)
        ]

    with ThreadPoolExecutor(3) as pool:
        for seed, texts in enumerate(pool.map(run, range(3))):
            assert texts == 3 * [expected[seed].tolist()]
    assert llama.config._attn_implementation == "sdpa"


def test_any_other_assistant_goes_transformers_own_way(llama):
    draft_model = tiny_model("llama", seed=1)
    expected = generate(llama, prompt(6)).sequences
    out = generate(llama, prompt(6), draft_model)
    assert out.sequences.tolist() == expected.tolist()
    assert not hasattr(out, "speculation")


def test_other_assistants_of_encoder_decoders():
    """Whose own path needs an argument that `generate` passes by the loop's signature."""
    config = T5Config(vocab_size=VOCAB, d_model=HIDDEN, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model, draft_model = T5ForConditionalGeneration(config).eval(), T5ForConditionalGeneration(config).eval()
    expected = model.generate(prompt(5), max_new_tokens=8, do_sample=False)
    out = model.generate(prompt(5), assistant_model=draft_model, max_new_tokens=8, do_sample=False)
    assert out.tolist() == expected.tolist()


def test_hook_has_an_inverse(llama):
    hooked = dict(vars(GenerationMixin))
    modeling_speculator.remove_generation_hook()
    try:
        assert GenerationMixin._assisted_decoding.__qualname__ == "GenerationMixin._assisted_decoding"
        with pytest.raises(AttributeError):
            generate(llama, prompt(6), random_speculator())
    finally:
        modeling_speculator.install_generation_hook()
        modeling_speculator.install_generation_hook()  # a second time changes nothing
    assert dict(vars(GenerationMixin)) == hooked
