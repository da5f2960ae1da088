"""What each head is trained on: which context vector, which token, which target, in both stages."""

import copy

import datasets
import pytest
import torch
from tiny_models import VOCAB
from trainings import arguments, rows, speculator
from transformers import LlamaForCausalLM

from modeling_speculator.trainers import DistillationTrainer, SpeculatorTrainer
from modeling_speculator.trainers.losses import mixed


class CountingModel(LlamaForCausalLM):
    """After token t always comes t + 1; the context vector holds the token that was read last, in every entry."""

    def __init__(self, config):
        super().__init__(config)

        def what_was_read(module, args, kwargs, output):
            output.last_hidden_state = kwargs["input_ids"][:, :, None].expand_as(output.last_hidden_state).float()
            return output

        self.model.register_forward_hook(what_was_read, with_kwargs=True)

    def forward(self, input_ids=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        follower = torch.nn.functional.one_hot((input_ids[:, -1:] + 1) % VOCAB, VOCAB)
        outputs.logits = 1e4 * follower.float()
        return outputs


@pytest.fixture
def counting(llama):
    model = CountingModel(copy.deepcopy(llama.config)).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


@pytest.mark.parametrize("n_predict", [1, 3])
def test_stage_1_alignment(tmp_path, counting, n_predict):
    trainer = SpeculatorTrainer(speculator(n_predict), counting, arguments(tmp_path))
    text = torch.arange(20).repeat(2, 1)
    hidden_states, input_ids, labels, *_ = trainer.batch({"input_ids": text})
    read = hidden_states[0, :, 0].long()  # the token at each position
    assert read.tolist() == list(range(20 - n_predict - 1))  # from the first on, as far as every head has a target
    for position, token in enumerate(read.tolist()):
        assert input_ids[0, position] == token + 1  # the token drawn from that vector
        assert labels[0, position : position + n_predict].tolist() == [token + 2 + i for i in range(n_predict)]
    assert labels.shape[1] == len(read) + n_predict - 1
    trainer.model(hidden_states, input_ids, labels)  # the lengths are those of the forward


@pytest.mark.parametrize("n_predict", [1, 3])
def test_stage_2_alignment(tmp_path, counting, n_predict):
    trainer = DistillationTrainer(speculator(n_predict), counting, arguments(tmp_path), generation_length=10)
    prompts = torch.tensor([[3, 50, 20], [7, 7, 30]])  # generated: 21, 22, ... and 31, 32, ...
    hidden_states, input_ids, labels, *_ = trainer.batch({"input_ids": prompts})
    for row, last in enumerate([20, 30]):
        read = hidden_states[row, :, 0].long().tolist()
        assert read == [last + i for i in range(10 - n_predict)]  # the prompt's last position comes first
        assert input_ids[row].tolist() == [last + 1 + i for i in range(9)]
        assert labels[row].tolist() == [last + 2 + i for i in range(9)]


def test_stage_2_stops_at_the_end_of_a_text(tmp_path, counting):
    counting.generation_config.eos_token_id = [25, 40]
    trainer = DistillationTrainer(speculator(), counting, arguments(tmp_path), generation_length=10)
    prompts = torch.tensor([[25, 3, 20], [7, 7, 30]])
    labels = trainer.batch({"input_ids": prompts}).labels
    assert labels[0].tolist() == [22, 23, 24, 25] + 5 * [-100]
    assert labels[1].tolist() == list(range(32, 41))


def test_stage_2_when_every_text_ends_at_once(tmp_path, counting):
    counting.generation_config.eos_token_id = 21
    trainer = DistillationTrainer(speculator(), counting, arguments(tmp_path), generation_length=10)
    prompts = torch.tensor([[25, 3, 20], [7, 7, 20]])
    batch = trainer.batch({"input_ids": prompts})
    assert (batch.labels == -100).all()
    assert trainer.compute_loss(trainer.model, {"input_ids": prompts}) == 0


def test_documents_that_share_a_sequence(tmp_path, counting):
    """Their first n_predict + 1 tokens are no targets, and none of what is one is guessed from another document."""
    trainer = SpeculatorTrainer(speculator(), counting, arguments(tmp_path))
    text = torch.tensor([[*range(9), *range(30, 39)]])
    position_ids = torch.tensor([[*range(9), *range(9)]])
    hidden_states, _, labels, *_ = trainer.batch({"input_ids": text, "position_ids": position_ids})
    read = hidden_states[0, :, 0].tolist()
    assert labels[0].tolist() == [*range(2, 9), -100, -100, -100, -100, *range(34, 39)]
    for head in range(3):
        for position, token in enumerate(read):
            target = int(labels[0, position + head])
            assert target == -100 or (target < 30) == (token < 30)
    plain = trainer.batch({"input_ids": text}).labels
    assert plain[0].tolist() == [*range(2, 9), *range(30, 39)]


def test_stage_2_samples_from_the_base_model(tmp_path, llama):
    """Not greedily, and from the ten most probable tokens only, whatever the base model's own config says."""
    model = copy.deepcopy(llama)
    model.generation_config.do_sample, model.generation_config.top_k = False, 1
    model.generation_config.repetition_penalty, model.generation_config.num_beams = 5.0, 2
    model.generation_config.return_dict_in_generate, model.generation_config.no_repeat_ngram_size = True, 1
    theirs = model.generation_config
    trainer = DistillationTrainer(speculator(), model, arguments(tmp_path), generation_length=20)
    prompts = torch.randint(VOCAB, (8, 4), generator=torch.Generator().manual_seed(0))
    input_ids = trainer.batch({"input_ids": prompts}).input_ids
    text = torch.cat([prompts, input_ids], dim=1)
    with torch.no_grad():
        logits = llama(text).logits[:, 3:-1]
    rank = (logits > logits.gather(2, text[:, 4:, None])).sum(-1)
    assert model.generation_config is theirs
    assert rank.max() < 10
    assert rank.float().mean() > 0.3


@pytest.mark.parametrize("loss", [["lk_hybrid"], ["total_variation", "cross_entropy"]])
def test_losses_on_the_base_models_distribution(tmp_path, llama, make_trainer, loss):
    """Of the trainer's batch: head i at position j against the logits that the next tokens were drawn from."""
    trainer = make_trainer(llama, arguments(tmp_path, loss=loss, head_weights=[1.0, 0.5, 0.25]))
    text, first = torch.tensor(rows(2, 12)["input_ids"][:]), 0  # the first context vector's position
    batch = trainer.batch({"input_ids": text})
    n = batch.hidden_states.shape[1]
    if isinstance(trainer, DistillationTrainer):
        text, first = torch.cat([text, batch.input_ids], dim=1), 11
    logits = llama(text).logits[:, first:]
    expected = 0.0
    for head, weight in enumerate([1.0, 0.5, 0.25]):
        ours = trainer.model(batch.hidden_states, batch.input_ids).logits[head].flatten(0, 1)
        theirs = logits[:, head + 1 : head + 1 + n].flatten(0, 1)
        labels = batch.labels[:, head : head + n].flatten()
        expected += weight * mixed(loss, [1.0] * len(loss), ours, labels, theirs).mean()
    trainer.batch = lambda inputs: batch
    torch.testing.assert_close(trainer.compute_loss(trainer.model, {}), expected, atol=1e-4, rtol=1e-4)


def test_accuracy_is_counted_per_head(tmp_path, counting):
    """A speculator that always predicts 7 is right where 7 comes, head by head."""
    model = speculator()
    trainer = SpeculatorTrainer(model, counting, arguments(tmp_path, per_device_eval_batch_size=3))
    with torch.no_grad():
        for head, ln in zip(model.speculator.head, model.speculator.ln, strict=True):
            ln.weight.zero_()
            ln.bias.fill_(1.0)
            head.weight.zero_()
            head.weight[7] = 1.0
    text = [[0, 1, 2, 7, 4, 5, 7, 7]] * 4  # head 1 is trained on 2 7 4 5, head 2 on 7 4 5 7, head 3 on 4 5 7 7
    metrics = trainer.evaluate(datasets.Dataset.from_dict({"input_ids": text}))
    assert [metrics[f"eval_accuracy_head_{head}"] for head in (1, 2, 3)] == [0.25, 0.5, 0.5]
