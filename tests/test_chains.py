"""Base models with a recurrent state: the text is theirs, and what was rejected leaves no trace in the state."""

from functools import partial

import pytest
import torch
from drafters import context_speculator, eagle3_speculator, streaming_speculator
from test_drafter_state import SAME
from test_generation import random_speculator
from tiny_models import prompts, tiny_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig

from modeling_speculator import PromptLookup
from modeling_speculator.chains import MOST_AGAIN
from modeling_speculator.families import CHAINS
from modeling_speculator.measuring.evaluation import starts_of_drafts
from modeling_speculator.measuring.oracle import Oracle


HERE = [name for name in CHAINS if name in CONFIG_MAPPING]
GREEDY = {"max_new_tokens": 40, "do_sample": False}
_LAYERS = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"]},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "attention_head_dim": 16},
}
_STATES = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_headdim": 8,
    "n_mamba_heads": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "mamba_chunk_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "n_groups": 1,
    "chunk_size": 16,
    "expand": 2,
    "mamba_expand": 2,
    "block_dim": 32,
    "block_ff_dim": 48,
    "block_auto_adjust_ff_dim": False,
}


def hybrid(model_type):
    """A tiny random model, of one layer with a state and, where there are such, one of attention."""
    known = {name for part in CONFIG_MAPPING[model_type].__mro__ for name in getattr(part, "__annotations__", {})}
    sizes = {name: size for name, size in _STATES.items() if name in known}
    torch.manual_seed(0)
    config = tiny_config(model_type, **sizes | _LAYERS.get(model_type, {}))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "conv" not in name:
                weight.normal_(std=0.4 if "head" in name or "emb" in name else 0.25)
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module")
def qwen():
    return hybrid("qwen3_next")


def chain(model, text, p_right=0.7):
    return Oracle(model, text, p_right=p_right, n_candidates=1)


@pytest.mark.parametrize("model_type", HERE)
def test_the_text_is_the_models_own(model_type):
    model = hybrid(model_type)
    expected = model.generate(**prompts(1), **GREEDY)
    for p_right, least, most in ((0.0, 1, 1), (0.7, 1.5, 3.9), (1.0, 3.9, 4)):
        oracle = chain(model, expected, p_right)
        out = model.generate(**prompts(1), **GREEDY, assistant_model=oracle, return_dict_in_generate=True)
        assert out.sequences.tolist() == expected.tolist()
        assert least <= out.speculation.tokens_per_step <= most


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 12},
        {"repetition_penalty": 1.3},
        {"eos_token_id": [3, 7, 11]},
        {"max_new_tokens": 1},
        {"max_new_tokens": 70},
        {"min_new_tokens": 30, "eos_token_id": [3, 7, 11]},
    ],
    ids=lambda options: " ".join(options),
)
def test_options(qwen, options):
    """Sampled text does not depend on what is drafted; other text is plain decoding's."""
    options = GREEDY | options
    torch.manual_seed(0)
    off = {"assistant_model": PromptLookup(2)} if options["do_sample"] else {}
    expected = qwen.generate(**prompts(1), **options, **off)
    torch.manual_seed(0)
    given = qwen.generate(**prompts(1), **options, assistant_model=chain(qwen, expected))
    assert given.tolist() == expected.tolist()


@pytest.mark.parametrize("speculation", [None, "adaptive"])
def test_a_speculator_and_lookup(qwen, speculation):
    expected = qwen.generate(**prompts(1), **GREEDY)
    config = GenerationConfig(**GREEDY, speculation=speculation, pad_token_id=0)
    for drafter in (random_speculator(n_candidates=1), random_speculator(n_candidates=0), PromptLookup(4)):
        given = qwen.generate(**prompts(1), generation_config=config, assistant_model=drafter)
        assert given.tolist() == expected.tolist()


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2", "granitemoehybrid"])
def test_the_cache_that_is_handed_back(model_type):
    """Holds all tokens but the last, and nothing of what was rejected."""
    model = hybrid(model_type)
    whole = model.generate(**prompts(1), max_new_tokens=50, do_sample=False)
    for n in (18, 19, 20, 21):
        options = {"max_new_tokens": n, "do_sample": False, "return_dict_in_generate": True}
        out = model.generate(**prompts(1), **options, assistant_model=chain(model, whole))
        went_on = model.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=50 - n)
        assert went_on.tolist() == whole.tolist()


@pytest.mark.parametrize("make", [context_speculator, eagle3_speculator])
def test_drafters_that_read_texts(qwen, make):
    """They start from what the whole text says, in one pass."""
    text = qwen.generate(**prompts(1), **GREEDY)
    speculator = make(qwen)
    speculator.config.n_candidates = 1
    starts = starts_of_drafts(qwen, speculator, text, torch.ones_like(text))
    found = []
    bound = type(speculator).beside

    def beside(self, base_model):
        drafter = bound(self, base_model)
        draft = drafter.generate_candidates
        drafter.generate_candidates = lambda states, *args, **kwargs: (
            found.append(states) or draft(states, *args, **kwargs)
        )
        return drafter

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(speculator), "beside", beside)
        given = qwen.generate(**prompts(1), **GREEDY, assistant_model=speculator)
    assert given.tolist() == text.tolist() and len(found) > 10
    nearest = [float((starts - states).norm(dim=-1).amin()) for states in found]
    assert max(nearest) < SAME * float(starts.norm(dim=-1).mean())


def test_what_is_run_again_is_bounded(qwen):
    """However often a step rejects something."""
    text, lengths = qwen.generate(**prompts(1), **GREEDY), []

    def note(module, args, kwargs):
        lengths.append(kwargs["input_ids"].shape[1])

    hook = qwen.register_forward_pre_hook(note, with_kwargs=True)
    qwen.generate(**prompts(1), **GREEDY, assistant_model=chain(qwen, text, p_right=0.5))
    hook.remove()
    assert len(lengths) > 10 and max(lengths[1:]) <= MOST_AGAIN + 2 * 4


def test_refused(qwen):
    generate = partial(qwen.generate, max_new_tokens=4)
    text = qwen.generate(**prompts(1), **GREEDY)
    with pytest.raises(ValueError, match="verifies a chain, but no tree: set `speculator.config.n_candidates = 1`"):
        generate(**prompts(1), assistant_model=Oracle(qwen, text))
    with pytest.raises(ValueError, match="verifies a chain, but no tree"):
        generate(**prompts(1), assistant_model=random_speculator(n_candidates=1, n_lookup_tokens=2))
    oracle = chain(qwen, text)
    with pytest.raises(ValueError, match="pass one at a time"):
        generate(torch.ones(2, 4, dtype=torch.long), assistant_model=oracle)
    mask = torch.tensor([[0, 1, 1, 1]])
    with pytest.raises(ValueError, match="padding would change it"):
        generate(torch.ones(1, 4, dtype=torch.long), attention_mask=mask, assistant_model=oracle)
    with pytest.raises(ValueError, match="no static cache of it"):
        generate(**prompts(1), assistant_model=oracle, cache_implementation="static")
    with pytest.raises(ValueError, match="`output_hidden_states` is not supported"):
        options = {"output_hidden_states": True, "return_dict_in_generate": True}
        generate(**prompts(1), assistant_model=oracle, **options)
    streams = streaming_speculator(qwen)
    streams.config.n_candidates = 1
    with pytest.raises(ValueError, match="streams can't run beside it"):
        generate(**prompts(1), assistant_model=streams)
