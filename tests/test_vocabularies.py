"""Base models with some tokens more or less than a speculator has: what both have is drafted, and no text changes."""

import copy

import pytest
import torch
from datasets import Dataset
from drafters import Oracle
from test_bad_requests import refuses
from test_static import TRACED
from tiny_models import HIDDEN, VOCAB, tiny_model
from trainings import arguments
from trainings import speculator as small_speculator
from transformers import GenerationConfig

from modeling_speculator import MLPSpeculatorPreTrainedModel
from modeling_speculator.drafters import DRAFTERS, turned
from modeling_speculator.measuring.acceptance import measure_acceptance
from modeling_speculator.modeling_bound import BoundSpeculator
from modeling_speculator.modeling_medusa import MedusaModel
from modeling_speculator.trainers import DistillationTrainer, SpeculatorTrainer
from modeling_speculator.vocabularies import beside


FEW = 5  # tokens that one of the two has and the other has not
OPTIONS = {"do_sample": False, "max_new_tokens": 60, "return_dict_in_generate": True}


def speculator(vocab_size=VOCAB, model_class=MLPSpeculatorPreTrainedModel, **config):
    torch.manual_seed(0)
    config_class = next(some for some, its_class in DRAFTERS.items() if its_class is model_class)
    return model_class(config_class(vocab_size=vocab_size, emb_dim=HIDDEN, **config)).eval()


@pytest.fixture(scope="module")
def grown():
    """A base model that says its new tokens all the time."""
    model = tiny_model("llama")
    model.resize_token_embeddings(VOCAB + FEW, mean_resizing=False)
    with torch.no_grad():
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            weight[VOCAB:] = 1.2 * weight[:FEW].flip(0)
    return model


@pytest.fixture(scope="module")
def shrunk():
    model = tiny_model("llama")
    model.resize_token_embeddings(VOCAB - FEW)
    return model


@pytest.fixture(params=["grown", "shrunk"])
def other(request):
    return request.getfixturevalue(request.param)


def batch(model):
    """Left-padded prompts that end with the last of the base model's tokens."""
    last = model.config.vocab_size - 1
    return {
        "input_ids": torch.tensor([[3, last, 7, 1, last - 1], [0, 0, 5, 9, last]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
    }


class OwnDrafter:
    """A drafter of one's own, with other tokens than the base model: one draft ends with the last of them."""

    def __init__(self, model, text, mask, vocab_size):
        self.oracle = Oracle(model, text, mask, p_right=0.7)
        self.oracle.vocab_size = vocab_size
        self.device, self.config = self.oracle.device, self.oracle.config
        self.config.vocab_size = vocab_size

    def generate_candidates(self, hidden_states, input_ids, n_candidates=None):
        assert input_ids.max() < self.config.vocab_size
        drafted = self.oracle.generate_candidates(hidden_states, input_ids, n_candidates)
        drafted[:, -1, -1] = self.config.vocab_size - 1
        return drafted.clamp(max=self.config.vocab_size - 1)


def test_a_drafter_of_ones_own(other):
    inputs = batch(other)
    expected = other.generate(**inputs, **OPTIONS).sequences
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 60), value=1)
    out = other.generate(**inputs, **OPTIONS, assistant_model=OwnDrafter(other, expected, mask, VOCAB))
    assert out.sequences.tolist() == expected.tolist()
    assert set(out.speculation.emitted_per_step) == {1, 2, 3, 4}
    if other.config.vocab_size > VOCAB:
        assert (expected[:, 5:] >= VOCAB).sum() > 10  # the text has many that the drafter lacks


DIALS = [{}, {"n_candidates": 0}, {"n_tree_nodes": 7}, {"n_heads": 2}]
DRAFTED = {"greedy": {}, "sampled": {"do_sample": True, "top_p": 0.9}, "walked": {"repetition_penalty": 1.3}}


@pytest.mark.parametrize("dials", DIALS)
@pytest.mark.parametrize("option", DRAFTED)
def test_any_dial(other, dials, option):
    drafter, inputs = speculator(), batch(other)
    options = OPTIONS | {"max_new_tokens": 30} | DRAFTED[option]

    def generate(assistant_model, **extra):
        torch.manual_seed(0)
        return other.generate(**inputs, **options | extra, assistant_model=assistant_model).sequences.tolist()

    with turned(drafter, {"n_candidates": 0}):
        expected = generate(drafter if options["do_sample"] else None)
    with turned(drafter, dials):
        assert generate(drafter) == expected
        assert generate(drafter, cache_implementation="static") == expected
        assert generate(drafter, generation_config=GenerationConfig(speculation="adaptive")) == expected


def test_compiled(other):
    inputs, static = batch(other), {"cache_implementation": "static", "compile_config": TRACED}
    expected = other.generate(**inputs, **OPTIONS).sequences
    out = other.generate(**inputs, **OPTIONS, **static, assistant_model=speculator())
    assert out.sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("dials", [{}, {"n_tree_nodes": 9}])
@pytest.mark.parametrize("model_class", [some for some in DRAFTERS.values() if not issubclass(some, BoundSpeculator)])
def test_what_the_base_model_lacks_is_not_drafted(shrunk, model_class, dials):
    """However probable it is; what comes next is drafted in its place."""
    drafter = speculator(model_class=model_class, **dials)
    states = torch.ones(1, 1, HIDDEN)
    with torch.no_grad():
        for head in drafter.speculator.head:  # the same features for all tokens, the last ones the most of them
            head.weight.copy_(head.weight.abs().mean(0) * torch.linspace(1, 2, VOCAB)[:, None])
    seen = beside(shrunk, drafter)

    def draft(some) -> set[int]:
        inputs = states, torch.tensor([[1]])
        drafted = some.generate_tree(*inputs, 9)[0] if dials else some.generate_candidates(*inputs)
        return set(drafted.flatten().tolist())

    assert max(draft(drafter)) == VOCAB - 1
    assert max(draft(seen)) == VOCAB - FEW - 1 and len(draft(seen)) > 1


def test_equal_vocabularies_have_nothing_in_between(llama):
    drafter = speculator()
    assert beside(llama, drafter) is drafter


def test_another_tokenizer(llama):
    refuses(
        llama, rf"`vocab_size={VOCAB + 1025}`.*LlamaForCausalLM has `vocab_size={VOCAB}`", speculator(VOCAB + 1025)
    )
    out = llama.generate(torch.arange(1, 5)[None], assistant_model=speculator(VOCAB + 1024), max_new_tokens=4)
    assert out.shape == (1, 8)


def test_fewer_tokens_than_a_head_drafts():
    model = tiny_model("llama")
    model.resize_token_embeddings(4)
    refuses(model, "`top_k_tokens_per_head` must hold integers between 1 and the vocabulary's 4", speculator())


def test_acceptance_is_simulated_as_it_is(other):
    drafter = speculator(n_candidates=10)
    for record in measure_acceptance(other, drafter, **batch(other), do_sample=False, max_new_tokens=60):
        assert record.simulated_per_step == record.emitted_per_step


LOSSES = ["cross_entropy", "forward_kl", "total_variation", "negative_log_acceptance", "lk_hybrid"]


@pytest.mark.parametrize("trainer_class", [SpeculatorTrainer, DistillationTrainer])
def test_training(other, tmp_path, trainer_class):
    """On tokens that the speculator lacks, which count as no position."""
    text = torch.randint(other.config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": text.tolist()})
    model = small_speculator()
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_class(
        model=model,
        base_model=other,
        args=arguments(tmp_path, loss=LOSSES, save_strategy="no", evaluation_prompts=2),
        train_dataset=data,
        eval_dataset=data,
        prompt_length=6,
        generation_length=8,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert all(value == value and abs(value) < 1e3 for value in metrics.values())
    assert all(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.config.vocab_size == VOCAB


@pytest.mark.parametrize("vocab_size", [VOCAB + 7, VOCAB - 7])
@pytest.mark.parametrize("config", [{}, {"tie_weights": True}, {"tie_weights": True, "method": "sum_lstm"}, "medusa"])
def test_the_speculators_own_vocabulary_is_resized(llama, tmp_path, config, vocab_size):
    model_class = MedusaModel if config == "medusa" else MLPSpeculatorPreTrainedModel
    drafter = speculator(model_class=model_class, **({} if config == "medusa" else config))
    shared = min(VOCAB, vocab_size)
    states, tokens = torch.randn(2, 5, HIDDEN), torch.randint(shared, (2, 7))
    before = drafter(states, tokens).logits
    n_parameters = len(list(drafter.parameters()))
    assert drafter.resize_token_embeddings(vocab_size) is drafter.get_input_embeddings()
    assert drafter.config.vocab_size == vocab_size
    assert len(list(drafter.parameters())) == n_parameters  # what was tied is tied
    after = drafter(states, tokens).logits
    assert after.shape[-1] == vocab_size
    torch.testing.assert_close(after[..., :shared], before[..., :shared])
    drafter.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert torch.equal(loaded(states, tokens).logits, after)
    for weight in drafter.state_dict().values():
        if weight.shape[0] == vocab_size > VOCAB:
            torch.testing.assert_close(weight[VOCAB:], weight[:VOCAB].mean(0).expand(vocab_size - VOCAB, -1))
    for embedding in (module for module in drafter.modules() if isinstance(module, torch.nn.Embedding)):
        assert embedding.num_embeddings == vocab_size
    assert all(head.out_features == vocab_size for head in drafter.speculator.head)


def test_ways_to_resize():
    drafter = speculator()
    assert drafter.resize_token_embeddings(pad_to_multiple_of=50).num_embeddings == 100
    drafter.resize_token_embeddings(300, mean_resizing=False)
    new = drafter.speculator.head[1].weight[100:]
    assert float(new.detach().std()) == pytest.approx(HIDDEN**-0.5, rel=0.1)
    weight = drafter.speculator.head[0].weight
    drafter.resize_token_embeddings()
    assert drafter.speculator.head[0].weight is weight
    with pytest.raises(ValueError, match="between 1 and the vocabulary's 4"):
        drafter.resize_token_embeddings(4)
    assert drafter.config.vocab_size == 300
