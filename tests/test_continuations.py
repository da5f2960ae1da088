"""What the base model writes for stage 2 and for evaluation: exactly its own words, whoever asks and however often."""

import copy

import datasets
import pytest
import torch
from accelerate import Accelerator
from test_run_lock import another_launch
from tiny_models import VOCAB, tiny_model
from trainings import speculator

from modeling_speculator.trainers import DistillationTrainer, SpeculatorTrainingArguments
from modeling_speculator.trainers.base_model import read
from modeling_speculator.trainers.continuations import ContinuationSampler
from modeling_speculator.trainers.generated import write_continuations


def prompts(n=6, length=5, seed=0):
    return torch.randint(VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [3, 4, 5, 6]
    return model


def test_greedy_is_generate(model):
    written = ContinuationSampler(model, 12, temperature=0.0)(prompts(), seed=0)
    expected = model.generate(prompts(), attention_mask=torch.ones_like(prompts()), max_new_tokens=12, do_sample=False)
    assert written.tokens[:, : expected.shape[1] - 5].tolist() == expected[:, 5:].tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_states_are_what_the_tokens_were_drawn_from(model, cache):
    written = ContinuationSampler(model, 12, cache_implementation=cache)(prompts(), seed=0)
    assert written.states.shape == (6, 12, 32)
    text = torch.cat([prompts(), written.tokens], dim=1)
    expected = read(model, text[:, :-1]).hidden_states[:, 4:]
    ended = written.labels == -100  # nothing is trained on what comes after an end
    torch.testing.assert_close(written.states[~ended], expected[~ended], atol=1e-4, rtol=1e-4)
    assert ended.any() and not ended.all()
    rank = (model.lm_head(expected) > model.lm_head(expected).gather(2, written.tokens[..., None])).sum(-1)
    assert rank[~ended].max() < 10  # top-k 10 ...
    assert rank[~ended].float().mean() > 0.3  # ... and not greedy


def test_a_text_belongs_to_its_prompt_and_seed(model):
    sampler = ContinuationSampler(model, 8)
    together = sampler(prompts(), seed=7)
    for row in range(6):
        torch.manual_seed(row)  # of no consequence
        alone = sampler(prompts()[row : row + 1], seed=7)
        assert alone.labels[0].tolist() == together.labels[row].tolist()
    assert sampler(prompts(), seed=8).tokens.tolist() != together.tokens.tolist()
    seeds = torch.tensor([7, 7, 7, 8, 8, 8])
    mixed = sampler.write(prompts(), seeds)[:, 5:]
    assert mixed[:3].tolist() == together.tokens[:3].tolist()
    assert mixed[3:].tolist() == sampler(prompts(), seed=8).tokens[3:].tolist()


def test_sampling_has_the_base_models_distribution():
    """Chi-square of the first token over many seeds, at another temperature and top-k."""
    model = tiny_model("llama")
    prompt, n = prompts(1), 4000
    sampler = ContinuationSampler(model, 1, temperature=1.5, top_k=4)
    tokens = sampler.write(prompt.expand(n, -1), torch.arange(n))[:, -1]
    with torch.no_grad():
        best = (model(prompt).logits[0, -1] / 1.5).topk(4)
    expected = best.values.softmax(-1) * n
    observed = torch.stack([(tokens == token).sum() for token in best.indices])
    assert observed.sum() == n
    assert ((observed - expected) ** 2 / expected).sum() < 16.27  # 3 degrees of freedom, one in a thousand


def test_the_base_models_own_generation_config_is_not_used(model):
    other = copy.deepcopy(model)
    other.generation_config.repetition_penalty, other.generation_config.num_beams = 5.0, 2
    theirs = other.generation_config
    assert torch.equal(
        ContinuationSampler(other, 8)(prompts(), 1).tokens, ContinuationSampler(model, 8)(prompts(), 1).tokens
    )
    assert other.generation_config is theirs


def rows(n=6):
    return datasets.Dataset.from_dict({"input_ids": prompts(n).tolist()})


def write(model, folder, n_rows, batch_size=4, **described):
    sampler = ContinuationSampler(model, 8)
    return write_continuations(rows(), sampler, Accelerator(cpu=True), folder, n_rows, batch_size, 3, described)


def test_written_continuations_are_the_samplers(model, tmp_path):
    written = write(model, tmp_path, 15)
    assert len(written) == 15
    seen = [tuple(row["input_ids"]) for row in written]
    assert len(set(seen[:6])) == len(set(seen[6:12])) == 6  # each prompt once a round, ...
    assert seen[:6] != seen[6:12]  # in another order, ...
    texts = {tuple(row["input_ids"]) + tuple(row["continuation"]) for row in written}
    assert len(texts) == 15  # with another continuation
    first = torch.tensor([written[0]["input_ids"]])
    expected = ContinuationSampler(model, 8).write(first, 3 + 2**32)[0, 5:]
    assert written[0]["continuation"] == expected.tolist()


def test_what_was_written_is_not_written_again(model, tmp_path, monkeypatch):
    first = write(model, tmp_path, 10)
    (tmp_path / "000000010-000000020.unfinished").write_text("cut off by a kill")
    calls = []
    original = ContinuationSampler.write
    monkeypatch.setattr(
        ContinuationSampler, "write", lambda self, *args: calls.append(len(args[0])) or original(self, *args)
    )
    assert write(model, tmp_path, 7)[:] == first.select(range(7))[:]
    assert calls == []
    more = write(model, tmp_path, 16, batch_size=8)
    assert sum(calls) == 6
    assert more.select(range(10))[:] == first[:]
    assert more[:] == write(model, tmp_path.with_name("at once"), 16)[:]


def test_two_launches_do_not_write_the_same(model, tmp_path):
    with another_launch(tmp_path), pytest.raises(ValueError, match="written to by process 7.*generated_dataset"):
        write(model, tmp_path, 4)
    written = write(model, tmp_path, 4)
    with another_launch(tmp_path):  # what is whole is only read
        assert write(model, tmp_path, 4)[:] == written[:]


def test_continuations_of_another_kind_are_refused(model, tmp_path):
    write(model, tmp_path, 4, base_model="one")
    with pytest.raises(ValueError, match="base_model='one', not base_model='other'.*another folder"):
        write(model, tmp_path, 4, base_model="other")


def test_continuations_of_other_prompts_are_refused(model, tmp_path, monkeypatch):
    write(model, tmp_path, 4)
    others = datasets.Dataset.from_dict({"input_ids": prompts(6, seed=1).tolist()})
    monkeypatch.setitem(globals(), "rows", lambda: others)
    with pytest.raises(ValueError, match="prompts='"):
        write(model, tmp_path, 4)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_training_on_continuations_from_disk(model, tmp_path, streamed):
    """Of a stream, too; and those of a base model of the same name, but other weights, are refused."""
    data = datasets.Dataset.from_dict({"input_ids": prompts(9).tolist()})
    sizes = {"max_steps": 2, "per_device_train_batch_size": 3, "generation_batch_size": 2}
    quiet = {"use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}

    def make(base_model):
        args = SpeculatorTrainingArguments(str(tmp_path / "out"), **sizes, **quiet)
        prompts_ = data.to_iterable_dataset() if streamed else data
        return DistillationTrainer(speculator(), base_model, args, 5, 8, train_dataset=prompts_)

    trainer = make(model)
    trainer.write_continuations(str(tmp_path / "written"))
    assert len(trainer.train_dataset) == 6
    trainer.train()
    with pytest.raises(ValueError, match="base_model_weights="):
        make(tiny_model("llama", seed=1)).write_continuations(str(tmp_path / "written"))
