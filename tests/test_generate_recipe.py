"""`recipes/generate.py`, as it is run from a terminal."""

import gzip
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from test_trace_page import Spans
from tiny_models import VOCAB, tiny_model, word_tokenizer
from transformers import AutoTokenizer

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel


SCRIPT = Path(__file__).parents[1] / "recipes/generate.py"
TEMPLATE = "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}assistant "


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama").save_pretrained(folder / "base_model")
    words = ["unknown", "user", "assistant", *(f"w{n}" for n in range(VOCAB - 3))]
    tokenizer = word_tokenizer(words)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "base_model")
    torch.manual_seed(0)
    speculator = MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=32))
    speculator.save_pretrained(folder / "speculator")
    return ["--base_model", str(folder / "base_model"), "--speculator", str(folder / "speculator")]


@pytest.fixture
def run(models, monkeypatch, capsys):
    def run_(*args, stdin=""):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *models, "--max_new_tokens", "12", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return run_


STATISTICS = (  # tokens, those of steps, steps, a mean; shares; a rate
    r"^\[12 tokens, 11 of them in (\d+) steps: (\d\.\d\d) tokens per step; "
    r"drafts accepted at positions 1 2 3: \d+ / \d+ / \d+ %; \d+\.\d tokens/s\]$"
)


def words(output):
    """What was generated: what is in brackets and the colours left out."""
    return re.findall(r"\bw\d+\b|unknown|user|assistant", re.sub(r"\[\d+ tokens.*\]|\033\[\d+m", "", output))


def test_statistics(run):
    """After the text, and what they say is what was counted."""
    *text, last = run("--prompt", "w3 w4 w5").splitlines()
    steps, mean = re.search(STATISTICS, last).groups()
    assert float(mean) == pytest.approx(11 / int(steps), abs=0.01)
    assert len(words(text[0])) == 12 and len(text) == 1
    *_, last = run("--prompt", "w3 w4 w5", "--max_new_tokens", 1).splitlines()
    assert last.startswith("[1 token, none of them in a step; ")


def test_beside_plain_generate(run):
    same = run("--prompt", "w3 w4 w5", "--compare")
    assert len(words(same)) == 12
    assert re.search(r"\[plain generate writes the same at \S+ tokens/s; with the speculator \S+ times as fast", same)
    other = run("--prompt", "w3 w4 w5", "--compare", "--temperature", 1)  # which spends its seed otherwise
    assert "[plain generate writes at" in other and len(words(other)) == 24


def test_a_page_of_the_steps(run, tmp_path):
    out = run("--prompt", "w3 w4 w5", "--html", tmp_path / "trace.html")
    assert f"Written: {tmp_path / 'trace.html'}" in out and len(words(out)) == 12
    shown = Spans((tmp_path / "trace.html").read_text()).found["text"][0]
    assert words(shown) == ["w3", "w4", "w5", *words(out)[:12]]
    with pytest.raises(SystemExit):
        run("--prompt", "w3", "--html", tmp_path / "trace.html", "--compare")


def test_streamed_and_colored_text_is_the_same(run):
    plain = run("--prompt", "w3 w4 w5")
    assert re.search(STATISTICS, plain.splitlines()[-1])
    assert len(words(plain)) == 12
    colored = run("--prompt", "w3 w4 w5", "--stream", "--color")
    assert words(colored) == words(plain)
    assert {"\033[36m", "\033[33m"} <= set(re.findall(r"\033\[3\dm", colored))
    assert words(run("--prompt", "w3 w4 w5", "--color", "--n_candidates", 0)) == words(plain)
    assert words(run("--prompt", "w3 w4 w5", "--n_tree_nodes", 9)) == words(plain)
    assert words(run("--prompt", "w3 w4 w5", "--n_lookup_tokens", 4)) == words(plain)
    assert words(run("--prompt", "w3 w4 w5", "--speculator", "lookup")) == words(plain)
    assert len(words(run("--prompt", "w3 w4 w5", "--temperature", 0.8))) == 12


def test_files_of_prompts(run, tmp_path):
    text, jsonl = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("w3 w4 w5\n\nw9\n")
    gzipped, turns = tmp_path / "HumanEval.jsonl.gz", tmp_path / "question.jsonl"
    jsonl.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("w3 w4 w5", "w9")))
    one_by_one = words(run("--prompts", text))
    assert len(one_by_one) == 24
    assert one_by_one[:12] == words(run("--prompt", "w3 w4 w5"))
    assert words(run("--prompts", jsonl, "--batch_size", 2)) == one_by_one
    gzipped.write_bytes(gzip.compress(jsonl.read_bytes(), mtime=0))
    turns.write_text("".join(json.dumps({"turns": [p, "w1"]}) + "\n" for p in ("w3 w4 w5", "w9")))
    assert words(run("--prompts", gzipped)) == words(run("--prompts", turns)) == one_by_one


def test_chat(run):
    """The second answer is what the base model says after all that was said."""
    answers = words(run("--chat", stdin="w7 w8\nw9\n\n"))
    assert len(answers) == 24
    said = " ".join(["user w7 w8 assistant", *answers[:12], "user w9 assistant"])
    assert words(run("--prompt", said)) == answers[12:]
    assert words(run("--chat", "--stream", "--color", stdin="w7 w8\nw9")) == answers


def test_what_does_not_go_together(models, run, capsys):
    with pytest.raises(SystemExit):
        run("--prompt", "w3", "--stream", "--batch_size", 2)
    assert "show one text at a time" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(models[1])
    tokenizer.chat_template = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
        with pytest.raises(SystemExit, match="has no chat template"):
            run("--chat")


def test_files_without_prompts(run, tmp_path):
    wrong = tmp_path / "prompts.jsonl"
    wrong.write_text('{"question": "w3"}\n')
    (tmp_path / "empty.txt").touch()
    for path, complaint in (
        (wrong, "line 1: of unknown form"),
        (tmp_path / "missing.txt", "there is no such file"),
        (tmp_path / "empty.txt", "holds no prompts"),
    ):
        with pytest.raises(SystemExit, match=f"generate.py: error: .*{path.name}.*{complaint}"):
            run("--prompts", path)
