"""Losses by hand, and in chunks as in one piece: values, gradients, memory."""

import math
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_draft_vocabulary import IDS
from tiny_models import VOCAB, tiny_model
from torch import nn

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.context_vectors import recorded_states
from modeling_speculator.families import output_logits
from modeling_speculator.modeling_residual import ResidualConfig, ResidualSpeculator
from modeling_speculator.trainers import losses
from modeling_speculator.trainers.base_model import check_output_logits
from modeling_speculator.trainers.chunked import chunked_linear
from modeling_speculator.trainers.objective import Objective


P = torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0]])
Q = torch.tensor([[0.2, 0.2, 0.6], [0.1, 0.4, 0.5]])
ALPHA = [0.2 + 0.2 + 0.2, 0.4]
KL = [0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.2) + 0.2 * math.log(0.2 / 0.6), math.log(1 / 0.4)]
W = [math.exp(-3 * alpha) for alpha in ALPHA]
BY_HAND = {
    "forward_kl": KL,
    "total_variation": [1 - alpha for alpha in ALPHA],
    "negative_log_acceptance": [-math.log(alpha) for alpha in ALPHA],
    "lk_hybrid": [w * kl + (1 - w) * (1 - alpha) for w, kl, alpha in zip(W, KL, ALPHA, strict=True)],
}


@pytest.mark.parametrize("name", losses.DISTRIBUTION_LOSSES)
def test_losses_by_hand(name):
    """Logits are log-probs plus anything; a token that is ruled out has one of -inf."""
    theirs, ours = P.log() + 3.0, Q.log() - 5.0
    torch.testing.assert_close(losses.DISTRIBUTION_LOSSES[name](ours, theirs), torch.tensor(BY_HAND[name]))


def test_cross_entropy_by_hand():
    loss = losses.cross_entropy(Q.log(), torch.tensor([2, -100]))
    torch.testing.assert_close(loss, torch.tensor([-math.log(0.6), 0.0]))


def test_at_a_point_mass_negative_log_acceptance_is_cross_entropy():
    point, q = torch.full((4, 7), -1e4), torch.randn(4, 7, requires_grad=True)
    labels = torch.tensor([0, 3, 6, 2])
    point[range(4), labels] = 0.0
    one = torch.autograd.grad(losses.negative_log_acceptance(q, point).sum(), q)
    other = torch.autograd.grad(losses.cross_entropy(q, labels).sum(), q)
    torch.testing.assert_close(one, other)


def test_its_gradient_is_total_variations_over_alpha():
    p, q = torch.randn(5, 9), torch.randn(5, 9, requires_grad=True)
    of_log = torch.autograd.grad(losses.negative_log_acceptance(q, p).sum(), q)[0]
    of_tv = torch.autograd.grad(losses.total_variation(q, p).sum(), q)[0]
    torch.testing.assert_close(of_log, of_tv / losses.acceptance(q, p).detach()[:, None])


@pytest.mark.parametrize("ruled_out", [-1e5, -math.inf])
def test_a_draft_that_can_never_be_accepted_has_a_finite_loss(ruled_out):
    p, q = torch.tensor([[0.0, ruled_out]]), torch.tensor([[-1e5, 0.0]], requires_grad=True)
    for loss in losses.DISTRIBUTION_LOSSES.values():
        value = loss(q, p)
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), q)[0].isfinite().all()


def test_a_mix():
    p, q, labels = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([1, -100, 4])
    mix = losses.mixed(["cross_entropy", "forward_kl", "argmax"], [0.25, 2.0, 3.0], q, labels, p, p.argmax(-1))
    expected = 0.25 * losses.cross_entropy(q, labels) + 2.0 * losses.forward_kl(q, p)
    expected -= 3.0 * q.log_softmax(-1)[range(3), p.argmax(-1)]
    torch.testing.assert_close(mix, expected)


def score(logits, at, labels, theirs):
    """A loss of each kind; each position's choice is what else is wanted."""
    loss = losses.mixed(["cross_entropy", "lk_hybrid"], [1.0, 1.0], logits, labels[at], theirs[at]).sum()
    return loss, logits.argmax(-1)[:, None]


@pytest.mark.parametrize("chunk_elements", [1, 11 * 4, 11 * 5, 10**6])
def test_chunks_are_the_whole(chunk_elements):
    torch.manual_seed(0)
    head, features = nn.Linear(6, 11, bias=False), torch.randn(13, 6, requires_grad=True)
    here = partial(score, labels=torch.randint(11, (13,)), theirs=torch.randn(13, 11))
    loss, choices = here(head(features), slice(None))
    (3 * loss).backward()
    expected = features.grad, head.weight.grad
    features.grad = head.weight.grad = None
    chunked_loss, chunked_choices = chunked_linear(head, features, here, chunk_elements)
    (3 * chunked_loss).backward()
    torch.testing.assert_close(chunked_loss, loss)
    assert torch.equal(chunked_choices, choices)
    torch.testing.assert_close((features.grad, head.weight.grad), expected)


def test_chunks_of_a_frozen_head_and_without_gradients():
    head, features = nn.Linear(6, 11, bias=False).requires_grad_(False), torch.randn(13, 6, requires_grad=True)
    here = partial(score, labels=torch.randint(11, (13,)), theirs=torch.randn(13, 11))
    loss, _ = chunked_linear(head, features, here, 22)
    (expected,) = torch.autograd.grad(here(head(features), slice(None))[0], features)
    torch.testing.assert_close(torch.autograd.grad(loss, features)[0], expected)
    with torch.no_grad():
        quiet, _ = chunked_linear(head, features, here, 22)
    torch.testing.assert_close(quiet, loss.detach())


def test_chunks_in_half_precision_round_no_more_than_the_whole():
    torch.manual_seed(0)
    head, features = nn.Linear(32, 50, bias=False), torch.randn(512, 32, requires_grad=True)
    here = partial(score, labels=torch.randint(50, (512,)), theirs=torch.randn(512, 50))
    exact = torch.autograd.grad(here(head(features), slice(None))[0], head.weight)[0]
    errors = []
    for chunk_elements in (50 * 16, 10**9):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = chunked_linear(head, features, here, chunk_elements)
        gradient = torch.autograd.grad(loss, head.weight)[0]
        assert gradient.dtype == torch.float32
        errors.append((gradient - exact).norm() / exact.norm())
    assert errors[0] < 1.5 * errors[1] < 0.05


def test_chunks_of_a_head_with_an_adapter():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 11, bias=False)), LoraConfig(target_modules=["0"], r=2))
    head, features = model.base_model.model[0], torch.randn(13, 6, requires_grad=True)
    nn.init.normal_(head.lora_B["default"].weight)
    weights = [features, head.lora_A["default"].weight, head.lora_B["default"].weight]
    here = partial(score, labels=torch.randint(11, (13,)), theirs=torch.randn(13, 11))
    expected = torch.autograd.grad(here(head(features), slice(None))[0], weights)
    loss, _ = chunked_linear(head, features, here, 22)
    torch.testing.assert_close(torch.autograd.grad(loss, weights), expected)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers how many elements the largest result of an operation had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_grows_with_positions_times_vocabulary():
    head, features = nn.Linear(8, 1000, bias=False), torch.randn(500, 8, requires_grad=True)
    here = partial(score, labels=torch.randint(1000, (500,)), theirs=torch.zeros(1, 1000).expand(500, -1))
    with LargestTensor() as largest:
        loss, _ = chunked_linear(head, features, here, chunk_elements=20_000)
        loss.backward()
    assert largest.elements <= 20_000


METHODS = {
    "published": {},
    "tied": {"tie_weights": True},
    "scaled": {"scale_input": True},
    "gated": {"method": "sum_lstm", "tie_weights": True},
}


@pytest.fixture(params=METHODS)
def speculator(request):
    torch.manual_seed(0)
    config = MLPSpeculatorConfig(vocab_size=30, emb_dim=8, inner_dim=12, n_predict=3, **METHODS[request.param])
    return MLPSpeculatorPreTrainedModel(config)


def objective(losses=("cross_entropy",), loss_weights=(1.0,), head_weights=(1.0, 1.0, 1.0), **kwargs):
    return Objective(list(losses), list(loss_weights), list(head_weights), [5, 3, 2], chunk_elements=90, **kwargs)


def inputs(n=6):
    torch.manual_seed(1)
    labels = torch.randint(30, (2, n + 2))
    labels[0, 4:6] = -100
    return torch.randn(2, n, 8), torch.randint(30, (2, n + 2)), labels


def test_the_objective_is_the_training_forward(speculator):
    expected = speculator(*inputs())
    out = speculator(*inputs(), objective=objective(head_weights=(1.0, 0.5, 0.0)))
    torch.testing.assert_close(out.losses, expected.losses)
    torch.testing.assert_close(out.loss, expected.losses[0] + 0.5 * expected.losses[1])
    weights = [weight for weight in speculator.parameters() if weight.requires_grad]
    mine = torch.autograd.grad(speculator(*inputs(), objective=objective()).loss, weights)
    torch.testing.assert_close(mine, torch.autograd.grad(expected.loss, weights))


def test_what_the_objective_counts(speculator):
    labels, logits = inputs()[2], speculator(*inputs()).logits
    out = speculator(*inputs(), objective=objective())
    for head, k in enumerate([5, 3, 2]):
        targets = labels[:, head : head + 6]
        best = logits[head].topk(k).indices
        counts = targets != -100
        assert out.counted[:, head].tolist() == counts.sum(-1).tolist()
        assert out.correct[:, head].tolist() == (best[..., 0] == targets).sum(-1).tolist()
        assert out.correct_top_k[:, head].tolist() == (best == targets[..., None]).any(-1).sum(-1).tolist()


def test_the_base_models_distribution_is_that_of_the_heads_token(speculator):
    """Against a loop over positions: head i at position j, and the state that its target was drawn from."""
    hidden_states, input_ids, labels = inputs()
    next_states, weight = torch.randn(2, 8, 8), torch.randn(30, 8)
    options = {"next_states": next_states, "base_logits": lambda states: states @ weight.T}
    out = speculator(hidden_states, input_ids, labels, objective=partial(objective(["forward_kl"]), **options))
    logits = speculator(hidden_states, input_ids).logits
    for head in range(3):
        values = [
            losses.forward_kl(logits[head, row, j][None], (next_states[row, head + j] @ weight.T)[None])
            for row in range(2)
            for j in range(6)
            if labels[row, head + j] != -100
        ]
        torch.testing.assert_close(out.losses[head], torch.cat(values).mean())


@pytest.mark.parametrize("loss", ["cross_entropy", "argmax", "forward_kl", "negative_log_acceptance"])
def test_a_head_learns_what_it_can_draft(llama, loss):
    """Against a loop over positions: targets that a draft vocabulary lacks add nothing, and p is one of the rest."""
    speculator = ResidualSpeculator(ResidualConfig(vocab_size=VOCAB, emb_dim=32, n_predict=3, draft_vocabulary=IDS))
    torch.nn.init.normal_(speculator.speculator.proj_out[0].weight)
    states, tokens, next_states = torch.randn(2, 6, 32), torch.randint(VOCAB, (2, 8)), torch.randn(2, 8, 32)
    labels = torch.tensor(IDS)[torch.randint(len(IDS), (2, 8))]
    labels[0, 2:4], labels[1, 3:5] = 9, -100  # 9 is not drafted
    options = {"next_states": next_states, "base_logits": partial(output_logits, llama)}
    out = speculator(states, tokens, labels, objective=partial(objective([loss]), **options), base_model=llama)
    logits = speculator(states, tokens, base_model=llama).logits[..., IDS]
    theirs, ids = output_logits(llama, next_states), torch.tensor(IDS)
    for head in range(3):
        values = []
        for row, at in ((row, at) for row in range(2) for at in range(6) if labels[row, head + at] != -100):
            p, q = theirs[row, head + at], logits[head, row, at]
            target = p.argmax() if loss == "argmax" else labels[row, head + at]
            if loss in losses.DISTRIBUTION_LOSSES:
                values.append(losses.DISTRIBUTION_LOSSES[loss](q[None], p[None, ids])[0])
            else:
                values.append(-q.log_softmax(-1)[ids == target].sum())
        torch.testing.assert_close(out.losses[head], torch.stack(values).mean())
        here = labels[:, head : head + 6]
        assert out.correct[:, head].tolist() == (ids[logits[head].argmax(-1)] == here).sum(-1).tolist()
        assert out.counted[:, head].tolist() == (here != -100).sum(-1).tolist()
    whole = objective([loss])
    speculator.config.draft_vocabulary = list(range(VOCAB))
    same = speculator(states, tokens, labels, objective=partial(whole, **options), base_model=llama).losses
    speculator.config.draft_vocabulary = None
    torch.testing.assert_close(
        speculator(states, tokens, labels, objective=partial(whole, **options), base_model=llama).losses, same
    )


def test_the_base_models_distribution_may_be_that_which_tokens_are_sampled_from(speculator):
    hidden_states, input_ids, labels = inputs()
    next_states, weight = torch.randn(2, 8, 8), torch.randn(30, 8)
    options = {"next_states": next_states, "base_logits": lambda states: states @ weight.T}
    sharp = objective(["forward_kl"], target_temperature=0.5, target_top_k=4)
    out = speculator(hidden_states, input_ids, labels, objective=partial(sharp, **options))
    logits = next_states[:, :6] @ weight.T * 2
    best = logits.topk(4).indices
    p = torch.zeros_like(logits).scatter(-1, best, logits.gather(-1, best).softmax(-1))
    log_q = speculator(hidden_states, input_ids).logits[0].log_softmax(-1)
    kl = (p * (p.clamp(min=1e-30).log() - log_q)).sum(-1)
    torch.testing.assert_close(out.losses[0], kl[labels[:, :6] != -100].mean())


def test_unrolled_heads_get_the_choices_of_the_heads_before(speculator):
    hidden_states, input_ids, labels = inputs()
    unrolled = partial(objective(unrolled_share=1.0), training=True)
    out = speculator(hidden_states, input_ids, labels, objective=unrolled)
    state, tokens = speculator.speculator.first_state(hidden_states), input_ids[:, :6]
    for head in range(3):
        state, logits = speculator.speculator.step(head, state, tokens)
        tokens = logits.argmax(-1)
        expected = losses.cross_entropy(logits.flatten(0, 1), labels[:, head : head + 6].flatten()).sum()
        torch.testing.assert_close(out.losses[head], expected / (labels[:, head : head + 6] != -100).sum())
    quiet = speculator(hidden_states, input_ids, labels, objective=objective(unrolled_share=1.0))
    torch.testing.assert_close(quiet.losses, speculator(hidden_states, input_ids, labels).losses)


def test_noise_is_added_in_training_only(speculator):
    plain = speculator(*inputs(), objective=objective()).loss
    noisy = objective(hidden_state_noise=0.5)
    assert speculator(*inputs(), objective=noisy).loss == plain
    assert speculator(*inputs(), objective=partial(noisy, training=True)).loss != plain


def test_output_logits_are_those_of_every_family(family):
    model = tiny_model(family)
    tokens = torch.arange(6)[None]
    with torch.no_grad(), recorded_states(model) as states:
        expected = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(output_logits(model, states[None][0]), expected)


def test_a_family_whose_logits_are_not_known_is_refused():
    model = tiny_model("llama")
    model.register_forward_hook(lambda module, args, output: output.__setitem__("logits", output.logits * 2))
    with pytest.raises(ValueError, match="not known as a function"):
        check_output_logits(model, torch.device("cpu"))
