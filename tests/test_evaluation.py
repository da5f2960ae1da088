"""Expected tokens per step, computed on texts that are there, against the steps that `generate` takes."""

import pytest
import torch
from tiny_models import VOCAB, tiny_model

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.measuring.evaluation import accepted_drafts, simulate_steps
from modeling_speculator.trainers.continuations import ContinuationSampler


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def trained(model, texts, **config):
    """A speculator that has learned some texts by heart, a fifth of the tokens wrongly."""
    torch.manual_seed(0)
    config = MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=32, inner_dim=64, n_predict=3, **config)
    speculator = MLPSpeculatorPreTrainedModel(config)
    optimizer = torch.optim.Adam(speculator.parameters(), 3e-3)
    states, tokens = texts.states[:, :-3], texts.tokens
    labels = torch.where(torch.rand(tokens.shape) < 0.2, torch.randint_like(tokens, VOCAB), tokens)
    for _ in range(120):
        loss = speculator(states, tokens, labels[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return speculator.eval()


@pytest.mark.parametrize("dials", [{}, {"n_candidates": 1}, {"n_tree_nodes": 9}], ids=str)
def test_simulated_steps_are_generates(model, dials):
    prompts = torch.randint(VOCAB, (8, 5), generator=torch.Generator().manual_seed(1))
    new_tokens = 40
    texts = ContinuationSampler(model, new_tokens, temperature=0.0)(prompts, 0)
    # Of half of the texts only, so that others are guessed now and then.
    speculator = trained(model, type(texts)(*(part[:4] for part in texts[:3])), **dials)
    # Of the last n_predict tokens it is not known what comes after: steps from there on are not counted.
    accepted = accepted_drafts(speculator, texts.states, texts.labels, chunk_elements=50_000)
    assert accepted.shape == (8, new_tokens - 3)
    for row in range(8):
        out = model.generate(
            prompts[row : row + 1],
            attention_mask=torch.ones(1, 5, dtype=torch.long),
            max_new_tokens=new_tokens,
            do_sample=False,
            assistant_model=speculator,
            return_dict_in_generate=True,
        )
        emitted, position, expected = list(out.speculation.emitted_per_step), 0, []
        while position < new_tokens - 3 and emitted:
            expected.append(emitted.pop(0))
            position += expected[-1]
        lengths = torch.tensor([new_tokens])
        steps, tokens = simulate_steps(accepted[row : row + 1], lengths)
        assert steps == len(expected)
        assert tokens - sum(expected) in range(3)  # `generate` cuts its last step at max_new_tokens
    assert {0, 1, 2, 3} <= set(accepted.flatten().tolist())


def test_simulated_steps_by_hand():
    accepted = torch.tensor([[2, 9, 9, 0, 3, 9], [0, 0, 0, 0, 0, 0]])
    assert simulate_steps(accepted[:1], torch.tensor([9])) == (3, 8)  # 3, then 1, then 4 tokens
    assert simulate_steps(accepted[:1], torch.tensor([5])) == (2, 4)
    assert simulate_steps(accepted[1:], torch.tensor([9])) == (6, 6)
    assert simulate_steps(accepted[1:], torch.tensor([1])) == (0, 0)  # the prefill's token alone
    assert simulate_steps(accepted, torch.tensor([9, 4])) == (6, 11)
    assert simulate_steps(accepted, torch.tensor([0, 0])) == (0, 0)


def test_without_candidates_nothing_is_accepted(model):
    config = MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=32, n_candidates=0)
    speculator = MLPSpeculatorPreTrainedModel(config)
    accepted = accepted_drafts(speculator, torch.randn(2, 9, 32), torch.zeros(2, 9, dtype=torch.long))
    assert accepted.tolist() == [[0] * 6] * 2
    assert simulate_steps(accepted, torch.tensor([9, 9])) == (12, 12)


def test_nothing_is_accepted_after_an_end(model):
    prompts = torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))
    texts = ContinuationSampler(model, 20, temperature=0.0)(prompts, 0)
    speculator = trained(model, texts)
    labels = texts.labels.clone()
    labels[:, 6:] = -100
    accepted = accepted_drafts(speculator, texts.states, labels)
    assert accepted.shape == (2, 17)
    assert (accepted + torch.arange(17) <= 5).logical_or(accepted == 0).all()
