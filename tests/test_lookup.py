"""Lookup branches: the right tokens, in the right place of the tree, and never another text."""

import pytest
import torch
from drafters import oracle_for
from hypothesis import given, settings
from hypothesis import strategies as st
from test_candidate_tree import path_tokens
from tiny_models import VOCAB, prompts, tiny_model
from transformers import CompileConfig, GenerationConfig

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel, PromptLookup
from modeling_speculator.candidate_tree import CandidateTree
from modeling_speculator.lookup import continuation, readable_tokens
from modeling_speculator.measuring.acceptance import measure_acceptance
from modeling_speculator.transformers_api import CACHE


def slow_continuation(text, readable, n_tokens):
    """Of one row, as one would say it."""
    for length in (4, 3, 2):
        end = text[len(text) - length :]
        if length > len(text) or not all(readable[len(text) - length :]):
            continue
        for place in range(len(text) - length - 1, -1, -1):
            if text[place : place + length] == end and all(readable[place : place + length]):
                follows = text[place + length :]
                return [follows[i % len(follows)] for i in range(n_tokens)]
    return None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=24), min_size=1, max_size=3),
    hidden=st.integers(0, 5),
    n_tokens=st.integers(1, 9),
)
def test_what_followed(rows, hidden, n_tokens):
    columns = max(map(len, rows)) + 3
    text = torch.tensor([row + [1] * (columns - len(row)) for row in rows])  # past the end: what a step left there
    readable = torch.ones_like(text, dtype=torch.bool)
    readable[:, :hidden] = False
    lengths = torch.tensor([[len(row)] for row in rows])
    tokens, found = continuation(text, readable, lengths, n_tokens)
    for row, is_found, drafted, seen in zip(rows, found, tokens.tolist(), readable.tolist(), strict=True):
        expected = slow_continuation(row, seen, n_tokens)
        assert is_found == (expected is not None)
        assert expected is None or drafted == expected


def test_places_for_images_are_not_read():
    config = tiny_model("llama").config
    config.image_token_id, config.eos_token_id = 7, 3
    try:
        seen = readable_tokens(torch.tensor([[0, 3, 7, 7, 5]]), torch.tensor([[0, 1, 1, 1, 1]]), config)
    finally:
        del config.image_token_id, config.eos_token_id
    assert seen.tolist() == [[False, True, False, False, True]]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    candidates=st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=0, max_size=5),
    branch=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    padding=st.integers(0, 3),
)
def test_a_branch_is_merged(candidates, branch, padding):
    """Beside a row that has none. The tree holds the paths of both, each node once, with its ancestors."""
    root = torch.tensor([[9], [9]])
    tree = CandidateTree.root_only(root)
    if candidates:
        drafted = torch.tensor([candidates] * 2)
        tree = CandidateTree.merge(root, drafted, 1 + 3 * len(candidates) + padding)
    grafted = tree.graft(torch.tensor([branch] * 2), torch.tensor([True, False]))
    for row, every in enumerate((candidates + [branch], candidates)):
        paths = {tuple(path[: n + 1]) for path in every for n in range(len(path))}
        nodes = range(1, int(grafted.n_nodes[row]))
        assert {tuple(path_tokens(grafted, row, node)[1:]) for node in nodes} == paths
        assert len(nodes) == len(paths)
        assert grafted.ancestors[row].diagonal().all()  # padding, too, sees at least itself
        for node in nodes:
            above, at = {node}, node
            while grafted.depths[row, at] > 0:
                assert grafted.parents[row, at] < at
                assert grafted.depths[row, at] == grafted.depths[row, grafted.parents[row, at]] + 1
                at = int(grafted.parents[row, at])
                above.add(at)
            assert set(grafted.ancestors[row, node].nonzero().flatten().tolist()) == above
    assert grafted.max_depth == max(tree.max_depth, len(branch))


# In the loop


@pytest.fixture
def speculator():
    torch.manual_seed(0)
    config = MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=32, n_lookup_tokens=6)
    return MLPSpeculatorPreTrainedModel(config).eval()


OPTIONS = {
    "greedy": {},
    "ends": {"eos_token_id": list(range(12))},
    "static": {"cache_implementation": "static"},
    "compiled": {"cache_implementation": "static", "compile_config": CompileConfig(backend="aot_eager")},
    "walked": {"repetition_penalty": 1.2},
    "walked and compiled": {"repetition_penalty": 1.2, "cache_implementation": "static"},
    "in chunks": {"prefill_chunk_size": 4},
    "several": {"num_return_sequences": 2, "do_sample": True, "top_k": 2},
    "sampled": {"do_sample": True, "top_k": 3},
    "adaptive": {"speculation": "adaptive"},
}


@pytest.mark.parametrize("drafts", ["prompt lookup", "speculator", "best nodes", "one head"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_text_is_the_base_models(llama, speculator, drafts, name):
    """With repetitions in the prompt, and in the text that follows; a seed gives the text that it gives undrafted."""
    options = {"do_sample": False, "max_new_tokens": 40} | OPTIONS[name]
    speculator.config.update({"best nodes": {"n_tree_nodes": 7}, "one head": {"n_heads": 1}}.get(drafts, {}))
    drafter = PromptLookup(6) if drafts == "prompt lookup" else speculator
    inputs = prompts()
    inputs["input_ids"][:, 5:] = inputs["input_ids"][:, 1:5]  # of 9

    def generate(assistant_model):
        torch.manual_seed(5)
        config = GenerationConfig(**options, return_dict_in_generate=True)
        return llama.generate(**inputs, generation_config=config, assistant_model=assistant_model)

    out = generate(drafter)
    n_candidates, drafter.config.n_candidates = drafter.config.n_candidates, 0
    assert out.sequences.tolist() == generate(drafter).sequences.tolist()  # nothing is drafted
    drafter.config.n_candidates = n_candidates
    if not options["do_sample"]:
        of_the_loop = {"compile_config", "cache_implementation", "speculation"}
        plain = {key: options[key] for key in options.keys() - of_the_loop}
        assert out.sequences.tolist() == llama.generate(**inputs, **plain).tolist()
    assert len(out.speculation.accepted_per_position) == 6
    if name not in ("several", "sampled", "adaptive", "ends"):  # greedy text of a random model repeats itself
        assert max(max(row.emitted_per_step) for row in out.speculation.per_sequence) == 7


def test_more_than_either_alone(llama):
    """An oracle that is right half of the time, and the repetitions of the text, in one tree."""
    inputs = prompts()
    text = llama.generate(**inputs, max_new_tokens=80, do_sample=False)

    def steps(**dials):
        drafter = oracle_for(llama, inputs, text, p_right=0.5)
        vars(drafter.config).update(dials)
        out = llama.generate(
            **inputs, max_new_tokens=80, do_sample=False, assistant_model=drafter, return_dict_in_generate=True
        )
        assert out.sequences.tolist() == text.tolist()
        return out.speculation

    alone, both = steps(), steps(n_lookup_tokens=8)
    lookup = llama.generate(
        **inputs, max_new_tokens=80, do_sample=False, assistant_model=PromptLookup(), return_dict_in_generate=True
    ).speculation
    assert both.steps < min(alone.steps, lookup.steps)
    assert len(both.accepted_per_position) == 8 and len(alone.accepted_per_position) == 3
    assert both.drafted_tokens / both.steps > alone.drafted_tokens / alone.steps


def test_simulated_steps_are_the_loops(llama, speculator):
    """Acceptance is computed from finished texts, too: a branch is in it."""
    inputs = prompts()
    inputs["input_ids"][:, 5:] = inputs["input_ids"][:, 1:5]
    measured = measure_acceptance(llama, speculator, **inputs, max_new_tokens=60, do_sample=False)
    assert all(row.emitted_per_step == row.simulated_per_step for row in measured)
    assert max(max(row.emitted_per_step) for row in measured) > 4


def test_a_passed_cache(llama):
    """Its tokens are text, where the caller gives them."""
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 5, 6]])}
    options = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True}
    first = llama.generate(**inputs, **options, assistant_model=PromptLookup())
    more = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    second = llama.generate(more, **{CACHE: first[CACHE]}, **options, assistant_model=PromptLookup())
    assert second.sequences.tolist() == llama.generate(more, do_sample=False, max_new_tokens=20).tolist()
    embeds = llama.get_input_embeddings()(more)
    only_new = llama.generate(inputs_embeds=embeds, **options, assistant_model=PromptLookup())
    assert only_new.sequences.tolist() == second.sequences[:, more.shape[1] :].tolist()


def test_the_dial_is_saved_where_it_is_set(speculator, tmp_path):
    speculator.save_pretrained(tmp_path)
    assert MLPSpeculatorConfig.from_pretrained(tmp_path).n_lookup_tokens == 6
    speculator.config.n_lookup_tokens = 0
    assert "n_lookup_tokens" not in speculator.config.to_diff_dict()


@pytest.mark.parametrize("value", [-1, 1.5, "8", True])
def test_no_numbers_of_tokens(llama, speculator, value):
    with pytest.raises(ValueError, match="`n_lookup_tokens` must be an integer of at least 0"):
        MLPSpeculatorConfig(n_lookup_tokens=value)
    for drafter in (speculator, PromptLookup()):
        drafter.config.n_lookup_tokens = value
        with pytest.raises(ValueError, match="`n_lookup_tokens` must be an integer of at least"):
            llama.generate(**prompts(), max_new_tokens=4, assistant_model=drafter)
    with pytest.raises(ValueError, match="of at least 1, but is 0"):
        PromptLookup(0)
