"""Sampled text has the base model's distribution: all texts of three tokens, counted and compared."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessor
from transformers.generation import logits_process as lp

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel, SpeculationStatistics
from modeling_speculator.sampling import SCORES_ONLY, TokenDraw, draw_row_keys, gumbel_noise, token_keys


VOCAB, LENGTH = 5, 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def speculator():
    torch.manual_seed(1)
    config = MLPSpeculatorConfig(
        vocab_size=VOCAB, emb_dim=16, n_predict=2, top_k_tokens_per_head=[4, 3], n_candidates=9
    )
    return MLPSpeculatorPreTrainedModel(config).eval()


class Own(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores - (input_ids[:, -1:] == torch.arange(VOCAB)) * 1.5


def allowed(row, input_ids):
    return [token for token in range(VOCAB) if token != (len(input_ids) + int(input_ids[-1])) % VOCAB]


# What `generate` is asked for, and the processors that this means, in their order.
CASES = {
    "plain": ({"top_k": 0}, []),
    "temperature": ({"top_k": 0, "temperature": 0.6}, [lp.TemperatureLogitsWarper(0.6)]),
    "hot": ({"top_k": 0, "temperature": 1.8}, [lp.TemperatureLogitsWarper(1.8)]),
    "top_k": ({"top_k": 3}, [lp.TopKLogitsWarper(3)]),
    "top_p": ({"top_k": 0, "top_p": 0.8}, [lp.TopPLogitsWarper(0.8)]),
    "min_p": ({"top_k": 0, "min_p": 0.15}, [lp.MinPLogitsWarper(0.15)]),
    "typical": ({"top_k": 0, "typical_p": 0.8}, [lp.TypicalLogitsWarper(0.8)]),
    "repetition": (
        {"top_k": 4, "repetition_penalty": 1.5},
        [lp.RepetitionPenaltyLogitsProcessor(1.5), lp.TopKLogitsWarper(4)],
    ),
    "ngrams": ({"top_k": 0, "no_repeat_ngram_size": 2}, [lp.NoRepeatNGramLogitsProcessor(2)]),
    "prefix": (
        {"top_k": 0, "prefix_allowed_tokens_fn": allowed},
        [lp.PrefixConstrainedLogitsProcessor(allowed, 1)],
    ),
    "own": ({"top_k": 0, "logits_processor": [Own()]}, [Own()]),
}


def distribution(model, prompt, processors):
    """The probability of every text of LENGTH tokens after prompt (1, n), token by token from the base model."""
    probabilities = {(): 1.0}
    for _ in range(LENGTH):
        texts = [torch.cat([prompt, torch.tensor([text], dtype=torch.long)], dim=1) for text in probabilities]
        scores = model(torch.cat(texts)).logits[:, -1].detach().split(1)
        for processor in processors:
            scores = [processor(text, score) for text, score in zip(texts, scores, strict=True)]
        after = torch.cat(scores).softmax(-1).tolist()
        probabilities = {
            (*text, token): probability * after[n][token]
            for n, (text, probability) in enumerate(probabilities.items())
            for token in range(VOCAB)
        }
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
    return probabilities


def p_value(texts, probabilities):
    """Pearson's chi-square test of texts against probabilities; rare ones are counted together."""
    n = len(texts)
    counts = dict.fromkeys(probabilities, 0)
    for text in texts:
        counts[text] += 1
    assert not any(counts[text] for text, p in probabilities.items() if p == 0)
    common = [text for text, p in probabilities.items() if n * p >= 8]
    cells = [(counts[text], n * probabilities[text]) for text in common]
    rest = 1 - sum(probabilities[text] for text in common)
    if n * rest >= 1:
        cells.append((n - sum(count for count, _ in cells), n * rest))
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)))


def sample(model, speculator, prompts, copies, **options):
    out = model.generate(
        prompts,
        attention_mask=(prompts >= 0).long(),
        assistant_model=speculator,
        do_sample=True,
        max_new_tokens=LENGTH,
        num_return_sequences=copies,
        return_dict_in_generate=True,
        **options,
    )
    return [tuple(row) for row in out.sequences[:, prompts.shape[1] :].tolist()], out.speculation


@pytest.mark.parametrize("name", CASES)
def test_distribution(model, speculator, name):
    options, processors = CASES[name]
    prompts = torch.tensor([[1, 2, 3, 0], [4, 4, 1, 2]])
    # The rows of a batch advance together if a processor is the user's own: large ones would accept nothing.
    copies, calls = (1, 600) if name == "own" else (2000, 1)
    torch.manual_seed(7)
    parts, speculation = zip(
        *(sample(model, speculator, prompts, copies, **options) for _ in range(calls)), strict=True
    )
    accepted = SpeculationStatistics.pool(speculation).accepted_per_position
    assert accepted[0] > 0.05  # or nothing of a draft would be tested
    for row, prompt in enumerate(prompts.split(1)):
        of_prompt = [text for part in parts for text in part[row * copies : (row + 1) * copies]]
        assert p_value(of_prompt, distribution(model, prompt, processors)) > 1e-3


def test_the_test_would_notice(model, speculator):
    torch.manual_seed(7)
    prompt = torch.tensor([[1, 2, 3, 0]])
    texts, _ = sample(model, speculator, prompt, 2000, top_k=0, temperature=0.85)
    assert p_value(texts, distribution(model, prompt, [])) < 1e-6


def test_one_row_many_seeds(model, speculator):
    """Batch 1, where the noise of each text comes from a seed of its own."""
    prompt, texts = torch.tensor([[1, 2, 3, 0]]), []
    for seed in range(600):
        torch.manual_seed(seed)
        texts += sample(model, speculator, prompt, 1, top_k=0)[0]
    assert p_value(texts, distribution(model, prompt, [])) > 1e-3


def test_noise_is_standard_gumbel_and_independent():
    torch.manual_seed(0)
    keys, positions = draw_row_keys(40, CPU)[:, None], torch.arange(50)[None]
    noise = gumbel_noise(keys, positions, token_keys(101, CPU))
    assert noise.shape == (40, 50, 101)
    assert abs(noise.mean() - 0.5772) < 0.01
    assert abs(noise.var() - torch.pi**2 / 6) < 0.02
    uniform = torch.exp(-torch.exp(-noise)).flatten()
    counts = torch.histc(uniform, 50, 0, 1)
    expected = len(uniform) / 50
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor(24.5), statistic / 2) > 1e-3
    for axis in range(3):  # neighbours in row, position and token
        a, b = noise.narrow(axis, 0, noise.shape[axis] - 1), noise.narrow(axis, 1, noise.shape[axis] - 1)
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.01


def test_noise_belongs_to_row_and_position():
    torch.manual_seed(0)
    keys = draw_row_keys(3, CPU)[:, None]
    noise = gumbel_noise(keys, torch.tensor([[4, 5, 6]]), token_keys(11, CPU))
    again = gumbel_noise(keys[1:2], torch.tensor([[6, 4]]), token_keys(11, CPU))
    assert torch.equal(again[0], noise[1, [2, 0]])
    assert noise.isfinite().all()


def test_a_forbidden_token_is_never_drawn():
    """Whatever the noise is, and even where a single token is left."""
    draw = TokenDraw([], draw_row_keys(1, CPU), vocab_size=7)
    scores = torch.full((1, 3000, 7), -torch.inf)
    scores[..., 4] = -50.0
    for length in range(20):
        tokens, drawable = draw.at_nodes(scores, torch.zeros(1, 3000, dtype=torch.long), 0, torch.tensor([[length]]))
        assert (tokens == 4).all() and drawable.all()


def test_scores_only_processors_do_not_read_the_text():
    """They are handed none."""
    arguments = {
        lp.EpsilonLogitsWarper: (0.1,),
        lp.EtaLogitsWarper: (0.1,),
        lp.MinPLogitsWarper: (0.1,),
        lp.SuppressTokensLogitsProcessor: ([1, 2],),
        lp.TemperatureLogitsWarper: (0.5,),
        lp.TopHLogitsWarper: (0.5,),
        lp.TopKLogitsWarper: (3,),
        lp.TopPLogitsWarper: (0.5,),
        lp.TypicalLogitsWarper: (0.5,),
    }
    scores = torch.randn(6, 20)
    for kind in SCORES_ONLY:
        processor = kind(*arguments.get(kind, ()))
        together = processor(None, scores.clone())
        for row in range(6):  # and treat each row for itself
            torch.testing.assert_close(processor(None, scores[row : row + 1].clone())[0], together[row])
