"""Scripted base models and drafts: the exact tokens, steps and accepted counts of the loop."""

import copy

import pytest
import torch
from tiny_models import FAMILIES
from transformers import LlamaForCausalLM

from modeling_speculator import SpeculationStatistics


class CountingModel(LlamaForCausalLM):
    """After token t always comes t + 1; records the tokens of each forward."""

    def forward(self, input_ids=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        self.forwards.append(input_ids[0].tolist())
        follower = torch.nn.functional.one_hot((input_ids + 1) % self.config.vocab_size, self.config.vocab_size)
        outputs.logits = follower[:, -outputs.logits.shape[1] :].float()
        return outputs


class ScriptedDrafter:
    """Drafts what the script says, call by call; the last entry is repeated."""

    def __init__(self, model, *script):
        self.script, self.roots = list(script), []
        self.device = model.device
        self.config = type(
            "Config",
            (),
            {
                "model_type": "mlp_speculator",
                "vocab_size": model.config.vocab_size,
                "emb_dim": model.config.hidden_size,
                "n_candidates": len(script[0]),
                "n_predict": len(script[0][0]),
            },
        )()

    def generate_candidates(self, hidden_states, input_ids):
        self.roots.append(input_ids.item())
        return torch.tensor([self.script.pop(0) if len(self.script) > 1 else self.script[0]])


@pytest.fixture
def model():
    model = CountingModel(copy.deepcopy(FAMILIES["llama"])).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    model.forwards = []
    return model


def run(model, drafter, max_new_tokens):
    out = model.generate(
        torch.tensor([[9, 10]]),
        assistant_model=drafter,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert out.sequences.tolist() == [list(range(9, 11 + max_new_tokens))]
    return out.speculation


def test_never_right(model):
    drafter = ScriptedDrafter(model, [[1, 2], [3, 4]])
    stats = run(model, drafter, 4)
    assert model.forwards == [[9, 10], [11, 1, 3, 2, 4], [12, 1, 3, 2, 4], [13, 1, 3, 2, 4]]
    assert (stats.steps, stats.tokens, stats.drafted_tokens) == (3, 3, 12)
    assert stats.accepted_per_position == [0, 0]


def test_always_right_on_the_second_branch(model):
    script = [[[12, 50], [12, 13]], [[15, 16], [15, 50]], [[60, 61], [18, 19]]]
    drafter = ScriptedDrafter(model, *script)
    stats = run(model, drafter, 10)
    # The common first token of the branches is one node.
    assert model.forwards == [[9, 10], [11, 12, 50, 13], [14, 15, 16, 50], [17, 60, 18, 61, 19]]
    assert drafter.roots[:3] == [11, 14, 17]
    assert (stats.steps, stats.tokens, stats.drafted_tokens) == (3, 9, 3 + 3 + 4)
    assert stats.accepted_per_position == [1, 1]


def test_sometimes_right(model):
    script = [[[12, 13], [1, 2]], [[15, 50], [16, 17]], [[1, 17], [2, 18]], [[18, 19], [18, 20]]]
    stats = run(model, ScriptedDrafter(model, *script), 10)
    # emitted: 11 | 12 13 14 | 15 16 | 17 | 18 19 20
    assert [forward[0] for forward in model.forwards[1:]] == [11, 14, 16, 17]
    assert (stats.steps, stats.tokens) == (4, 9)
    assert stats.accepted_per_position == [0.75, 0.5]


def test_a_right_token_after_a_wrong_one_is_not_accepted(model):
    stats = run(model, ScriptedDrafter(model, [[50, 13, 14]]), 2)
    assert stats.accepted_per_position == [0, 0, 0]


def test_identical_candidates_are_one_path(model):
    stats = run(model, ScriptedDrafter(model, [[12, 13], [12, 13], [12, 13]]), 4)
    assert model.forwards == [[9, 10], [11, 12, 13]]
    assert (stats.steps, stats.tokens, stats.drafted_tokens) == (1, 3, 2)


def test_statistics_per_row_and_in_all():
    emitted = torch.tensor([[3, 1], [1, 2], [2, 0]])  # the second row ends after two steps
    n_nodes = torch.tensor([[5, 6], [6, 6], [6, 4]])
    stats = SpeculationStatistics.from_counts(emitted, n_nodes, n_candidates=[5, 0, 5], n_predict=2)
    first, second = stats.per_sequence
    assert (first.steps, first.tokens, first.drafted_tokens) == (3, 6, 14)
    assert (second.steps, second.tokens, second.drafted_tokens) == (2, 3, 10)
    assert (stats.steps, stats.tokens, stats.drafted_tokens) == (5, 9, 24)
    assert stats.tokens_per_step == 9 / 5
    assert (first.candidates_per_step, second.candidates_per_step) == ((5, 0, 5), (5, 0))
    assert stats.accepted_per_position == [3 / 5, 1 / 5]
