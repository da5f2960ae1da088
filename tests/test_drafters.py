"""The drafters beside the MLP speculator: by hand, in the loop, in the trainers, on disk."""

import json

import pytest
import torch
from tiny_models import VOCAB, prompts, tiny_model
from torch.nn import functional as F
from trainings import arguments, rows
from transformers import AutoModel, GenerationConfig

from modeling_speculator import MedusaConfig, MedusaModel, MLPSpeculatorConfig, drafters, modeling_medusa
from modeling_speculator.families import output_logits
from modeling_speculator.modeling_unconditioned import UnconditionedConfig, UnconditionedSpeculator
from modeling_speculator.trainers import ModelArguments, SpeculatorTrainer, load_or_create_speculator


SHAPE = {"vocab_size": VOCAB, "emb_dim": 32, "n_predict": 3}
UNREAD = {
    "medusa": (MedusaConfig(**SHAPE), MedusaModel),
    "unconditioned": (UnconditionedConfig(**SHAPE, inner_dim=24), UnconditionedSpeculator),
}


@pytest.fixture(params=UNREAD)
def drafter(request):
    """One whose heads don't know what the heads before have drafted; its weights are far from where they start."""
    torch.manual_seed(0)
    config, model_class = UNREAD[request.param]
    model = model_class(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    return model


def test_medusa_by_hand():
    torch.manual_seed(0)
    model = MedusaModel(MedusaConfig(**SHAPE)).eval()
    heads = model.speculator
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    hidden_states, input_ids = torch.randn(2, 5, 32), torch.randint(VOCAB, (2, 7))
    logits = model(hidden_states, input_ids).logits
    for i in range(3):
        features = hidden_states + F.silu(hidden_states @ heads.proj[i].weight.T + heads.proj[i].bias)
        torch.testing.assert_close(logits[i], features @ heads.head[i].weight.T)


def test_without_tokens_it_is_the_published_recurrence_with_embeddings_of_zero():
    torch.manual_seed(0)
    ours = UnconditionedSpeculator(UnconditionedConfig(**SHAPE, inner_dim=24)).eval()
    published = AutoModel.from_config(MLPSpeculatorConfig(**SHAPE, inner_dim=24)).eval()
    weights = ours.state_dict() | {f"speculator.emb.{i}.weight": torch.zeros(VOCAB, 24) for i in range(3)}
    published.load_state_dict(weights)
    inputs = torch.randn(2, 5, 32), torch.randint(VOCAB, (2, 7))
    torch.testing.assert_close(ours(*inputs).logits, published(*inputs).logits)


def test_no_head_reads_the_tokens(drafter):
    hidden_states = torch.randn(2, 5, 32)
    one, other = (drafter(hidden_states, torch.randint(VOCAB, (2, 7))).logits for _ in range(2))
    assert torch.equal(one, other)


def test_what_is_drafted(drafter):
    """All sequences of the heads' best tokens, best first, however few branches were computed."""
    hidden_states, input_ids = torch.randn(2, 1, 32), torch.randint(VOCAB, (2, 1))
    log_probs = drafter(hidden_states, input_ids.expand(2, 3)).logits[:, :, 0].log_softmax(-1)  # (heads, batch, vocab)
    best, tokens = zip(*(log_probs[head].topk(k) for head, k in enumerate((5, 3, 2))), strict=True)
    candidates = drafter.generate_candidates(hidden_states, input_ids, n_candidates=7)
    for row in range(2):
        total = best[0][row][:, None, None] + best[1][row][None, :, None] + best[2][row][None, None, :]
        order = total.flatten().argsort(descending=True)[:7]
        expected = torch.cartesian_prod(*(head[row] for head in tokens))[order]
        assert candidates[row].tolist() == expected.tolist()


def test_the_output_is_the_base_models(drafter, family):
    model, inputs = tiny_model(family), prompts()
    plain = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    for n_tree_nodes in (None, 6):
        drafter.config.n_tree_nodes = n_tree_nodes
        assert torch.equal(
            model.generate(**inputs, assistant_model=drafter, max_new_tokens=20, do_sample=False), plain
        )


def test_sampling_and_static_shapes(drafter, llama):
    inputs = prompts()
    for options in ({"do_sample": True}, {"cache_implementation": "static"}):
        config = GenerationConfig(max_new_tokens=20, **options)
        texts = []
        for n_candidates in (0, 5):
            drafter.config.n_candidates = n_candidates
            torch.manual_seed(0)
            texts.append(llama.generate(**inputs, assistant_model=drafter, generation_config=config))
        assert torch.equal(*texts)


def test_saved_and_loaded(drafter, tmp_path):
    drafter.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(drafter)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in drafter.state_dict().items())
    assert "method" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("method", UNREAD)
def test_a_recipe_trains_one(tmp_path, llama, method):
    model = load_or_create_speculator(ModelArguments(base_model="here", method=method, n_predict=3), llama)
    if method == "medusa":  # every head starts as the base model's
        hidden_states = torch.randn(1, 2, 32)
        logits = model(hidden_states, torch.zeros(1, 4, dtype=torch.long)).logits
        torch.testing.assert_close(logits, llama.lm_head(hidden_states).expand(3, -1, -1, -1))
    data = rows(2, 24)
    args = arguments(tmp_path, max_steps=100, learning_rate=1e-2, save_strategy="no", weight_decay=0.0)
    trainer = SpeculatorTrainer(model, llama, args, train_dataset=data, eval_dataset=data)
    untrained = trainer.evaluate()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.train()
    trained = trainer.evaluate()
    assert [key for key, value in model.state_dict().items() if torch.equal(value, before[key])] == []
    for head in (1, 2, 3):
        assert trained[f"eval_accuracy_head_{head}"] > untrained[f"eval_accuracy_head_{head}"] + 0.3


@pytest.mark.parametrize("family", ["llama", "granite", "cohere", "gpt_bigcode"])
def test_medusa_heads_start_as_the_lm_head_of_every_family(family):
    model = tiny_model(family)
    heads = load_or_create_speculator(ModelArguments(base_model="here", method="medusa"), model)
    with torch.no_grad():
        hidden_states = torch.randn(1, 2, model.config.hidden_size)
        logits = heads(hidden_states, torch.zeros(1, 4, dtype=torch.long)).logits
        torch.testing.assert_close(logits[0], output_logits(model, hidden_states))


def test_a_drafter_of_ones_own(request, llama):
    class MyConfig(MLPSpeculatorConfig):
        model_type = "drafter_of_ones_own"
        methods = ("of_ones_own",)
        method: str = "of_ones_own"

    class MyDrafter(MedusaModel):
        config_class = MyConfig
        cells = {"of_ones_own": modeling_medusa.MedusaHeads}

    with pytest.raises(ValueError, match="must be one of sum_rnn, sum_lstm, .*context, .*unconditioned, but"):
        drafters.config_class_of("of_ones_own")
    drafters.register_drafter(MyConfig, MyDrafter)
    request.addfinalizer(lambda: drafters.DRAFTERS.pop(MyConfig))
    mine = load_or_create_speculator(ModelArguments(base_model="here", method="of_ones_own"), llama)
    assert type(mine) is MyDrafter
    out = llama.generate(**prompts(), assistant_model=mine, max_new_tokens=9, return_dict_in_generate=True)
    assert out.speculation.drafted_tokens > 0


def test_bad_configs():
    for options in ({"inner_dim": 16}, {"tie_weights": True}, {"scale_input": True}):
        with pytest.raises(ValueError, match="Medusa heads are as wide as the base model"):
            MedusaConfig(**SHAPE, **options)
    with pytest.raises(ValueError, match="has no tied form"):
        UnconditionedConfig(**SHAPE, tie_weights=True)
    with pytest.raises(ValueError, match="`method` must be one of medusa"):
        MedusaConfig(**SHAPE, method="sum_rnn")
