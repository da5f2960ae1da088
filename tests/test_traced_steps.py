"""Inductor computes with an `arange` in 32 bits, on a GPU: in a compiled step no larger number may meet one."""

import pytest
import torch
from test_static import fresh_compiler, prompts, speculator  # noqa: F401  fixtures
from torch._dynamo.backends.common import aot_autograd
from transformers import CompileConfig

from modeling_speculator import sampling


# Of what an index was made an index is: by arithmetic, element by element, or by what only moves numbers.
MOVES = ("view", "unsqueeze", "squeeze", "expand", "slice", "select", "clone", "permute", "repeat", "cat")
INT32 = range(-(2**31), 2**31)


def large_numbers_beside_indices(graph: torch.fx.Graph) -> list[str]:
    """Operations on something that an `arange` made and an integer outside of int32."""
    indices, found = set(), []
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        name, computes = node.target.name().split("::")[1].split(".")[0], torch.Tag.pointwise in node.target.tags
        has_index = not indices.isdisjoint(node.all_input_nodes)
        if name in ("arange", "iota") or (has_index and (computes or name in MOVES)):
            indices.add(node)
        if computes and has_index and any(type(value) is int and value not in INT32 for value in node.args):
            found.append(node.format_node())
    return found


def traced_steps(model, drafter, **options) -> list[torch.fx.Graph]:
    """The compiled steps of a call, in the operations that inductor gets."""
    graphs = []

    def compile_nothing(module, inputs):
        graphs.append(module.graph)
        return module.forward

    static = {"compile_config": CompileConfig(backend=aot_autograd(fw_compiler=compile_nothing), mode=None)}
    static["cache_implementation"] = "static"
    model.generate(**prompts(), assistant_model=drafter, max_new_tokens=8, **static, **options)
    return graphs


SAMPLING = {"do_sample": True, "top_p": 0.9, "temperature": 0.8}
DIALS = [{}, {"n_candidates": 0}, {"n_tree_nodes": 7, "n_lookup_tokens": 6}]


@pytest.mark.parametrize("dials", DIALS)
def test_no_large_number_meets_an_index(llama, speculator, dials):  # noqa: F811
    vars(speculator.config).update(dials)
    graphs = traced_steps(llama, speculator, **SAMPLING, eos_token_id=[3, 4])
    assert graphs
    for graph in graphs:
        assert not large_numbers_beside_indices(graph)


def test_the_test_would_notice(llama, speculator, monkeypatch):  # noqa: F811
    """Keys of tokens that are made within the step."""
    noise = sampling.gumbel_noise

    def made_within(row_keys, positions, keys):
        return noise(row_keys, positions, sampling.token_keys(len(keys), keys.device))

    monkeypatch.setattr(sampling, "gumbel_noise", made_within)
    found = [large_numbers_beside_indices(graph) for graph in traced_steps(llama, speculator, **SAMPLING)]
    assert found and all("-7046029254386353131" in lines[0] for lines in found)
