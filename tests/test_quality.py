"""Quality reports: what is the same is found to be, what is not is not."""

import json
from pathlib import Path

import commands
import pytest
import torch
from tiny_models import VOCAB, character_tokenizer, prompts, tiny_model

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.measuring.prompts import Prompt
from modeling_speculator.measuring.quality import compare_greedy, compare_samples, last_number, sample


RECIPE = Path(__file__).parents[1] / "recipes/check_quality.py"


@pytest.fixture(scope="module")
def speculator():
    torch.manual_seed(0)
    return MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=32)).eval()


def test_greedy_outputs_are_identical(llama, speculator):
    rows = compare_greedy(llama, speculator, **prompts(), max_new_tokens=20, eos_token_id=[3, 4, 5], pad_token_id=0)
    assert [row.identical for row in rows] == [True] * 3
    assert all(row.tokens_per_step >= 1 for row in rows)


def test_a_difference_is_found_and_sized(llama, speculator, monkeypatch):
    inputs, generate = prompts(), llama.generate

    def other_with_a_speculator(input_ids, assistant_model=None, **options):
        out = generate(input_ids, assistant_model=assistant_model, **options)
        if assistant_model is not None:
            out.sequences[1, 9 + 4] = (out.sequences[1, 9 + 4] + 1) % VOCAB
        return out

    monkeypatch.setattr(llama, "generate", other_with_a_speculator)
    rows = compare_greedy(llama, speculator, **inputs, max_new_tokens=10)
    assert [row.identical for row in rows] == [True, False, True]
    assert rows[1].position == 4
    text = generate(**inputs, max_new_tokens=4, do_sample=False)[1, 5:][None]  # without padding
    best = llama(text).logits[0, -1].detach().topk(2).values
    assert rows[1].gap == pytest.approx(float(best[0] - best[1]), abs=1e-4)


def test_samples_by_hand(llama):
    """Figures of a text that is known: its prompt's tokens forced out by a temperature of nearly 0."""
    tokenizer = character_tokenizer(eos_token="z")
    asked = [Prompt("", ("a",), reference="#### 7"), Prompt("", ("b",)), Prompt("", ("c",), reference="so 1,000.")]
    inputs = prompts()
    options = {"max_new_tokens": 12, "temperature": 1e-4, "top_k": 0, "pad_token_id": 0}
    rows = sample(llama, None, tokenizer, asked, **inputs, **options)
    text = llama.generate(**inputs, max_new_tokens=12, do_sample=False)
    alone = text[1, 5:][None]
    with torch.no_grad():
        log_probs = llama(alone).logits[0, 3:-1].log_softmax(-1).gather(-1, alone[0, 4:, None])
    assert rows[1]["log_likelihood"] == pytest.approx(float(log_probs.mean()), abs=1e-4)
    assert [row["length"] for row in rows] == [12.0] * 3
    assert ["score" in row for row in rows] == [True, False, True]


def test_what_differs_is_told_from_what_does_not(llama, speculator):
    """As many samples at another temperature are found out; those of the speculator are not."""
    tokenizer, asked = character_tokenizer(eos_token="z"), [Prompt("", ("a",))] * 3
    options = {"max_new_tokens": 30, "top_k": 0, "eos_token_id": [3, 4], "pad_token_id": 0}

    def draw(drafter, seed, temperature=1.0):
        torch.manual_seed(seed)
        return [
            row
            for _ in range(40)
            for row in sample(llama, drafter, tokenizer, asked, **prompts(), temperature=temperature, **options)
        ]

    plain = draw(None, 0)
    same = compare_samples(plain, draw(speculator, 1))
    assert min(row["p_value"] for row in same.values()) > 0.01
    other = compare_samples(plain, draw(speculator, 1, temperature=0.3))
    assert other["log_likelihood"]["p_value"] < 0.001
    assert other["log_likelihood"]["speculative"] > other["log_likelihood"]["plain"]


def test_p_values_by_hand():
    """Of 3 pairs that differ by 1: 2 of the 8 ways to swap them keep a mean as far from 0."""
    report = compare_samples([{"x": 0.0}] * 3, [{"x": 1.0}] * 3)
    assert report["x"]["plain"] == 0 and report["x"]["speculative"] == 1
    assert report["x"]["p_value"] == pytest.approx(2 / 8, abs=0.02)
    assert compare_samples([{"x": 2.0}] * 3, [{"x": 2.0}] * 3)["x"]["p_value"] == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [("#### 18", 18), ("5 + 6 = 11. So $1,234.50.", 1234.5), ("no", None), ("", None), ("minus -3", -3)],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_the_command(tmp_path, speculator):
    tiny_model("llama").save_pretrained(tmp_path / "base_model")
    character_tokenizer(eos_token="z").save_pretrained(tmp_path / "base_model")
    speculator.save_pretrained(tmp_path / "speculator")
    rows = [{"question": text, "answer": "#### 3"} for text in ("abc", "d", "ef")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = ["--base_model", tmp_path / "base_model", "--speculator", tmp_path / "speculator"]
    flags = [
        "--prompts",
        tmp_path / "p.jsonl",
        "--max_new_tokens",
        8,
        "--batch_size",
        2,
        "--output",
        tmp_path / "q.json",
    ]
    done = commands.run(RECIPE, *models, *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "q.json").read_text())
    assert (report["prompts"], report["identical_outputs"], report["samples"]) == (3, 3, 6)
    assert report["sampled"].keys() == {"length", "log_likelihood", "distinct_4grams", "score"}
    assert "Greedy: 3 of 3 outputs" in done.stdout
