"""Every option of `generate`: greedy output is plain decoding's, sampled text does not depend on what was drafted."""

import copy

import pytest
import torch
from drafters import Oracle, oracle_for
from tiny_models import VOCAB, character_tokenizer, prompts, tiny_model
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    WatermarkingConfig,
)


TOKENIZER = character_tokenizer()


class Recorder(LogitsProcessor):
    """A processor with a state: forbids what it has favoured before, and writes down every call."""

    def __init__(self):
        self.calls, self.banned = [], []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids.tolist())
        scores[:, self.banned] = -100.0  # in place, as some do
        if len(self.calls) % 3 == 0:
            self.banned.append(int(scores[0].argmax()))
        return scores


class After(StoppingCriteria):
    """Stops each row at the first token of a set; writes down every call."""

    def __init__(self, tokens):
        self.tokens, self.calls = tokens, []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append(input_ids.tolist())
        return torch.isin(input_ids[:, -1], torch.tensor(self.tokens))


def allowed(row, input_ids):
    """Depends on the row, on the text and on its length."""
    return [token for token in range(VOCAB) if (token + row + int(input_ids[-1]) + len(input_ids)) % 3]


# Options whose text differs from plain greedy text; `rows_apart`: whether rows of a batch may differ in length.
OPTIONS = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram": {"no_repeat_ngram_size": 1},
    "bad_words": {"bad_words_ids": [[n] for n in range(0, VOCAB, 3)] + [[1, 2], [4, 5, 7]]},
    "sequence_bias": {"sequence_bias": [[[n], 3.0] for n in range(1, 9)] + [[[2, 3], 20.0]]},
    "prefix": {"prefix_allowed_tokens_fn": allowed},
    "suppress": {"suppress_tokens": list(range(0, VOCAB, 2)), "begin_suppress_tokens": list(range(1, VOCAB, 4))},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(30))},
    "min_length": {"min_length": 19, "eos_token_id": list(range(30))},
    "forced_eos": {"forced_eos_token_id": 7},
    "exponential_decay": {"exponential_decay_length_penalty": (5, 1.3), "eos_token_id": [3, 4]},
    "guidance": {"guidance_scale": 1.7},
    "encoder_penalty": {"encoder_repetition_penalty": 1.5},
    "encoder_ngram": {"encoder_no_repeat_ngram_size": 1},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "renormalize": {"renormalize_logits": True, "repetition_penalty": 1.3},
    "stop_strings_without_an_end_token": {"stop_strings": ["K", "e"], "tokenizer": TOKENIZER},
    "several_eos": {"eos_token_id": list(range(8))},
    "stop_strings": {"stop_strings": ["lN", "vx", "Rt", "e"], "eos_token_id": 63, "tokenizer": TOKENIZER},
    "chunks": {"prefill_chunk_size": 4},
    "no_options": {},
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_greedy(llama, name, rows):
    if name == "chunks" and rows > 1:
        pytest.skip("transformers itself cuts masks of padded chunks otherwise")
    inputs = prompts(rows)
    options = {"max_new_tokens": 40, "do_sample": False} | OPTIONS[name]
    expected = llama.generate(**inputs, **options)
    # The oracle knows the longest text, so that it is right up to the end.
    oracle = oracle_for(llama, inputs, expected)
    out = llama.generate(**inputs, **options, assistant_model=oracle, return_dict_in_generate=True)
    assert out.sequences.tolist() == expected.tolist()
    if expected.shape[1] > 40:
        assert set(out.speculation.emitted_per_step) >= {1, 2, 3}


SAMPLING = {
    "plain": {"top_k": 0},
    "temperature": {"temperature": 0.6, "top_k": 0},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7, "top_k": 0},
    "min_p": {"min_p": 0.1, "top_k": 0},
    "typical": {"typical_p": 0.6, "top_k": 0},
    "top_h": {"top_h": 0.5, "top_k": 0},
    "cutoffs": {"epsilon_cutoff": 0.02, "eta_cutoff": 0.02, "top_k": 0},
    "repetition": {"repetition_penalty": 1.5, "top_k": 9},
    "ngrams": {"no_repeat_ngram_size": 2, "temperature": 0.5},
    "prefix": {"prefix_allowed_tokens_fn": allowed, "temperature": 0.5},
    "guidance": {"guidance_scale": 1.3, "temperature": 0.5},
    "ends": {"eos_token_id": list(range(9)), "temperature": 2.0, "min_new_tokens": 3},
    "several": {"num_return_sequences": 2, "top_k": 12},
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", SAMPLING)
def test_a_seed_gives_the_same_text_for_any_draft(llama, name, rows):
    inputs = prompts(rows)
    options = {"max_new_tokens": 30, "do_sample": True, "return_dict_in_generate": True} | SAMPLING[name]

    def sample(seed, drafter):
        torch.manual_seed(seed)
        return llama.generate(**inputs, **options, assistant_model=drafter)

    copies = options.get("num_return_sequences", 1)
    repeated = {key: value.repeat_interleave(copies, 0) for key, value in inputs.items()}
    plain = Oracle(llama, repeated["input_ids"], repeated["attention_mask"], n_candidates=0)
    expected = sample(3, plain).sequences
    accepted = set()
    for n_candidates in (1, 5):
        drafter = oracle_for(llama, repeated, expected, n_candidates=n_candidates)
        out = sample(3, drafter)
        assert out.sequences.tolist() == expected.tolist()
        accepted |= set(out.speculation.emitted_per_step)
    if expected.shape[1] > 30:
        assert len(accepted) >= 3
        assert max(accepted) >= 3
    assert sample(4, plain).sequences.tolist() != expected.tolist()


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_not_known_is_called_as_by_plain_decoding(llama, rows):
    """Once per token, in order, with the whole batch: a state of theirs is what it would be."""
    inputs, options = prompts(rows), {"max_new_tokens": 24, "do_sample": False}
    plain = llama.generate(**inputs, **options)
    for make in (
        lambda: ({"logits_processor": [recorder := Recorder()]}, recorder),
        lambda: ({"stopping_criteria": [after := After(plain[:, 21].tolist())]}, after),
    ):
        (theirs, expected), (ours, called) = make(), make()
        text = llama.generate(**inputs, **options, **theirs)
        oracle = oracle_for(llama, inputs, text)
        assert llama.generate(**inputs, **options, **ours, assistant_model=oracle).tolist() == text.tolist()
        assert called.calls == expected.calls


def test_criteria_that_replace_generates_own(llama):
    inputs = prompts()
    for options in (
        {"stopping_criteria": [MaxLengthCriteria(14)], "max_new_tokens": 24},
        {"stopping_criteria": [EosTokenCriteria(list(range(20)))], "eos_token_id": 63, "max_new_tokens": 24},
        {"stopping_criteria": [MaxTimeCriteria(0.0)], "max_new_tokens": 24},
        {"max_time": 0.0, "max_new_tokens": 24},
    ):
        expected = llama.generate(**inputs, **options, do_sample=False)
        oracle = oracle_for(llama, inputs, llama.generate(**inputs, max_new_tokens=24, do_sample=False))
        out = llama.generate(**inputs, **options, do_sample=False, assistant_model=oracle)
        assert out.tolist() == expected.tolist()


def test_a_string_that_ends_inside_an_accepted_run(llama):
    inputs = prompts(1)
    text = llama.generate(**inputs, max_new_tokens=24, do_sample=False)
    for place in range(9, 22):
        options = {
            "stop_strings": TOKENIZER.decode(text[0, place : place + 2]),
            "tokenizer": TOKENIZER,
            "max_new_tokens": 24,
            "do_sample": False,
        }
        expected = llama.generate(**inputs, **options)
        out = llama.generate(**inputs, **options, assistant_model=oracle_for(llama, inputs, text, p_right=1.0))
        assert out.tolist() == expected.tolist()
        assert expected.shape[1] < 9 + 24


def test_prompt_as_embeddings(llama):
    inputs = prompts()
    embeds = llama.get_input_embeddings()(inputs["input_ids"])
    expected = llama.generate(**inputs, max_new_tokens=24, do_sample=False)
    oracle = oracle_for(llama, inputs, expected)
    for extra in ({}, {"input_ids": inputs["input_ids"]}):
        given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], **extra}
        plain = llama.generate(**given, max_new_tokens=24, do_sample=False)
        out = llama.generate(**given, max_new_tokens=24, do_sample=False, assistant_model=oracle)
        assert out.tolist() == plain.tolist()
        assert out[:, -24:].tolist() == expected[:, -24:].tolist()


def test_what_a_processor_is_given_is_contiguous(llama):
    """As from plain decoding, where many take a `view` of it."""

    def favour(input_ids, scores):
        scores[:, input_ids.view(-1)[-1] % VOCAB] += 1
        return scores

    inputs, options = prompts(), {"max_new_tokens": 20, "do_sample": False, "logits_processor": [favour]}
    expected = llama.generate(**inputs, **options)
    out = llama.generate(**inputs, **options, assistant_model=oracle_for(llama, inputs, expected))
    assert out.tolist() == expected.tolist()


def test_tokens_of_another_dtype(llama):
    inputs, options = prompts(), {"max_new_tokens": 20, "do_sample": False}
    expected = llama.generate(**inputs, **options)
    oracle = oracle_for(llama, inputs, expected)
    inputs["input_ids"] = inputs["input_ids"].int()
    assert llama.generate(**inputs, **options, assistant_model=oracle).tolist() == expected.tolist()


def test_positions_of_the_callers_own(llama):
    inputs = prompts()
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) + 4) * inputs["attention_mask"]
    expected = llama.generate(**inputs, max_new_tokens=24, do_sample=False)
    drafter = oracle_for(llama, prompts(), expected)
    out = llama.generate(**inputs, max_new_tokens=24, do_sample=False, assistant_model=drafter)
    assert out.tolist() == expected.tolist()


def test_sampling_that_a_generation_config_asks_for(llama):
    model = copy.deepcopy(llama)
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)  # as Llama-2-chat's
    inputs = prompts(1)
    texts = set()
    for n_candidates in (0, 5):
        torch.manual_seed(0)
        drafter = oracle_for(model, inputs, inputs["input_ids"], n_candidates=n_candidates)
        texts.add(str(model.generate(**inputs, max_new_tokens=24, assistant_model=drafter).tolist()))
    assert len(texts) == 1


@pytest.mark.parametrize("walked", [{}, {"repetition_penalty": 1.1}])
def test_nan_in_the_logits_under_sampling(walked):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    inputs = prompts(1)
    drafter = oracle_for(tiny_model("llama"), inputs, inputs["input_ids"])
    with pytest.raises(ValueError, match="Can't sample.*NaN"):
        model.generate(**inputs, max_new_tokens=4, do_sample=True, top_k=0, assistant_model=drafter, **walked)
