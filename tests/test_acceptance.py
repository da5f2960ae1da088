"""Acceptance: by hand, against a slow loop and `out.speculation`, and the command from end to end."""

import json
from pathlib import Path

import commands
import pytest
import torch
from figures import check_figure, names, ticks
from tiny_models import VOCAB, character_tokenizer, prompts, tiny_model

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.context_vectors import read_context_vectors
from modeling_speculator.measuring import acceptance_report, plots
from modeling_speculator.measuring.acceptance import (
    bootstrap_interval,
    head_accuracy,
    measure_acceptance,
    measure_prompts,
    summarize,
    summarize_categories,
)
from modeling_speculator.measuring.prompts import Prompt
from modeling_speculator.measuring.records import RecordFile


RECIPE = Path(__file__).parents[1] / "recipes/evaluate_acceptance.py"


@pytest.fixture(scope="module")
def speculator():
    """One that knows much of what `llama` writes after `prompts`."""
    torch.manual_seed(0)
    model = tiny_model("llama")
    config = MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=32, inner_dim=64, n_candidates=3)
    speculator = MLPSpeculatorPreTrainedModel(config)
    inputs = prompts()
    text = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    with torch.no_grad():
        states = read_context_vectors(model, text, inputs["attention_mask"])[:, 8:-4]
    labels = torch.where(torch.rand(3, 59) < 0.2, torch.randint(VOCAB, (3, 59)), text[:, 10:])
    optimizer = torch.optim.Adam(speculator.parameters(), 3e-3)
    for _ in range(80):
        loss = speculator(states, text[:, 9:-1], labels[:, : states.shape[1] + 2]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return speculator.eval()


def slow_loop(model, speculator, prompt, max_new_tokens):
    """One prompt, no cache, no tree: a forward over all of every candidate."""
    text, emitted_per_step = prompt.tolist(), []

    def read(tokens):
        out = model(torch.tensor([tokens]), output_hidden_states=True)
        return out.logits[0].argmax(-1).tolist(), out.hidden_states[-1][0]

    choices, states = read(text)
    text.append(choices[-1])
    state = states[-1]
    while len(text) < len(prompt) + max_new_tokens:
        best = []
        for candidate in speculator.generate_candidates(state[None, None], torch.tensor([text[-1:]]))[0].tolist():
            choices, states = read(text + candidate)
            right = 0
            while right < len(candidate) and candidate[right] == choices[len(text) - 1 + right]:
                right += 1
            if right + 1 > len(best):
                best, state = choices[len(text) - 1 : len(text) + right], states[len(text) - 1 + right]
        best = best[: len(prompt) + max_new_tokens - len(text)]
        text += best
        emitted_per_step.append(len(best))
    return text[len(prompt) :], emitted_per_step


def test_a_slow_loop_the_statistics_and_the_report_agree(llama, speculator):
    inputs = prompts()
    options = {"max_new_tokens": 50, "do_sample": False}
    measured = measure_acceptance(llama, speculator, **inputs, **options)
    out = llama.generate(**inputs, assistant_model=speculator, return_dict_in_generate=True, **options)
    for row, acceptance in enumerate(measured):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row] == 1]
        with torch.no_grad():
            text, emitted = slow_loop(llama, speculator, prompt, 50)
        assert acceptance.continuation == text
        assert acceptance.emitted_per_step == emitted == list(out.speculation.per_sequence[row].emitted_per_step)
        assert acceptance.simulated_per_step == emitted
    records = [
        {"prompt": row, "turn": 0, "category": ""} | vars(acceptance) for row, acceptance in enumerate(measured)
    ]
    figures = summarize(records, 3)
    assert figures["tokens_per_step"] == out.speculation.tokens_per_step == figures["simulated_tokens_per_step"]
    assert figures["accepted_per_position"] == out.speculation.accepted_per_position
    assert figures["partings"] == []
    assert {1, 2, 3, 4} <= {emitted for row in measured for emitted in row.emitted_per_step}


@pytest.mark.parametrize(
    "dials", [{"n_tree_nodes": 7}, {"n_candidates": 1}, {"n_candidates": 0}, {"n_heads": 2}], ids=str
)
def test_simulation_is_exact_when_texts_end_early(llama, speculator, dials):
    """Sampled, with an end of text, and for every way to draft."""
    before = dict(vars(speculator.config))
    for dial, value in dials.items():
        setattr(speculator.config, dial, value)
    torch.manual_seed(1)
    options = {"do_sample": True, "temperature": 0.7, "eos_token_id": list(range(6)), "pad_token_id": 0}
    lengths = set()
    for _ in range(4):
        for row in measure_acceptance(llama, speculator, **prompts(), max_new_tokens=40, **options):
            lengths.add(len(row.continuation))
            assert row.emitted_per_step == row.simulated_per_step
            assert sum(row.emitted_per_step) == len(row.continuation) - 1
            assert row.counted == [max(0, len(row.continuation) - 1 - head) for head in range(3)]
    assert len(lengths) > 4
    vars(speculator.config).update(before)
    speculator.config.n_tree_nodes = speculator.config.n_heads = None


def test_head_accuracy_by_hand(speculator):
    """A speculator that always says 7, and drafts 7 and some more."""
    always = MLPSpeculatorPreTrainedModel(speculator.config).eval()
    with torch.no_grad():
        for head, ln in zip(always.speculator.head, always.speculator.ln, strict=True):
            ln.weight.zero_()
            ln.bias.fill_(1.0)
            head.weight.zero_()
            head.weight[7] = 2.0
            head.weight[8] = 1.0
    tokens = torch.tensor([[1, 7, 8, 7, 7, -100, -100, -100]])
    for chunk_elements in (1, 10**9):
        correct, drafted, counted = head_accuracy(always, torch.randn(1, 5, 32), tokens, chunk_elements)
        assert correct.tolist() == [[3, 2, 2]]  # of 7 8 7 7, of 8 7 7, of 7 7
        assert drafted.tolist() == [[4, 3, 2]]
        assert counted.tolist() == [[4, 3, 2]]


def record(prompt, emitted, simulated=None, category="", continuation=range(9), turn=0):
    return {
        "prompt": prompt,
        "turn": turn,
        "category": category,
        "continuation": list(continuation),
        "emitted_per_step": emitted,
        "drafted_tokens": 5 * len(emitted),
        "simulated_per_step": simulated or emitted,
        "correct": [3, 1],
        "correct_top_k": [4, 2],
        "counted": [8, 4],
    }


def test_figures_by_hand():
    looping = [1, 2, 1, 2, 1, 2, 1, 2, 1]
    records = [record(0, [3, 1, 2]), record(1, [3, 3], [3, 2, 1]), record(2, [1, 1, 1], continuation=looping)]
    figures = summarize(records, 2)
    assert (figures["prompts"], figures["new_tokens"], figures["steps"], figures["drafted_tokens"]) == (3, 27, 8, 40)
    assert figures["tokens_per_step"] == 15 / 8
    assert figures["tokens_per_step_without_loops"] == 12 / 5
    assert (figures["looping"], figures["texts"]) == (1, 3)
    assert figures["accepted_per_position"] == [4 / 8, 3 / 8]
    assert figures["simulated_tokens_per_step"] == 15 / 9
    assert figures["teacher_forced_accuracy"] == [3 / 8, 1 / 4]
    assert figures["teacher_forced_top_k_accuracy"] == [4 / 8, 2 / 4]
    assert figures["partings"] == [{"prompt": 1, "turn": 0, "step": 1}]
    nothing = summarize([record(0, [])], 2)
    assert nothing["tokens_per_step"] is None and nothing["tokens_per_step_interval"] is None


def test_the_interval_is_over_prompts():
    """Of 200 prompts, half at 1 token per step and half at 3: 2 give or take 1.96 / sqrt(200)."""
    records = [record(n, [1, 1] if n % 2 else [3, 3]) for n in range(200)]
    low, high = bootstrap_interval(records)
    assert low == pytest.approx(2 - 1.96 / 200**0.5, abs=0.02)
    assert high == pytest.approx(2 + 1.96 / 200**0.5, abs=0.02)
    # Turns of a prompt are one observation: as many of them as one likes make the interval no narrower.
    turns = [record(n, [1, 1] if n % 2 else [3, 3], turn=turn) for n in range(20) for turn in range(10)]
    low, high = bootstrap_interval(turns)
    assert high - low > 0.7
    assert bootstrap_interval([record(0, [2, 2])]) is None


CPU = {"processor": "a CPU", "threads": 2, "date": "2026-01-02"}
TITLE = plots.title("Acceptance", {"base model": "org/base", "speculator": "org/draft"}, CPU)


def report(records, n_predict=2, sampled=None):
    """As the command makes it."""
    modes = {"greedy": records} | ({"sampled": sampled} if sampled else {})
    found = {mode: summarize_categories(each, n_predict) for mode, each in modes.items()}
    found["greedy"]["sampling"] = None
    if sampled:
        found["sampled"]["sampling"] = {"temperature": 0.5, "top_k": 10}
    settings = {
        "base_model": "org/base",
        "speculator": "runs/draft",
        "dtype": "torch.float32",
        "prompts": "some.jsonl",
    }
    about = {"settings": settings, "machine": CPU, "versions": {"torch": "2.13"}}
    return found.pop("greedy") | found | about


def test_the_report():
    records = [record(0, [3, 1, 2], category="qa"), record(1, [3, 3], [3, 2, 1], category="code")]
    page = acceptance_report.page(report(records, sampled=records[:1]))
    head, _, rest = page.partition("\n\n| texts |")
    assert head.startswith("# Acceptance\n") and "| speculator | runs/draft |\n| date | 2026-01-02 |" in head
    assert "| dtype | float32 |" in head
    measured = "2 prompts of some.jsonl, 18 new tokens greedy and 9 new tokens sampled (temperature 0.5, top_k 10)"
    assert f"| measured | {measured} |" in head
    table, columns, parting = rest.split("\n\n")
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        "| greedy", "| greedy, qa", "| greedy, code", "| sampled"
    ]  # fmt: skip
    assert "| greedy, qa | 1 | 2.000 |  | 2.000 | 2.000 | 0.667, 0.333 | 0.375, 0.250 |" in table
    assert len(columns.splitlines()) == 1 + table.splitlines()[0].count("|")
    assert parting == "greedy: simulation and generation part in 1 continuations.\n"


def test_the_plot_by_position():
    found = report([record(0, [3, 1, 2])], sampled=[record(0, [1, 1, 2])])
    accepted, right = check_figure(figure := acceptance_report.figure(found, TITLE), "org/base", "org/draft", "a CPU")
    assert ticks(accepted) == ticks(right) == [1, 2]
    assert accepted.get_xlabel() == "drafted token" and right.get_xlabel() == "head, fed the true tokens"
    assert [line.get_ydata().tolist() for line in accepted.lines] == [[2 / 3, 1 / 3], [1 / 3, 0]]
    assert [line.get_ydata().tolist() for line in right.lines] == [[3 / 8, 1 / 4]] * 2
    assert names(figure) == ["greedy: 2.00 tokens per step", "sampled: 1.33 tokens per step"]


def test_the_plot_by_length():
    records = [record(n, [3, 1 + n % 2], category=f"{16 * 2 ** (n // 4)} tokens") for n in range(16)]
    found = report(records, sampled=records)
    (axes,) = check_figure(figure := acceptance_report.figure_of_lengths(found, [128, 16, 32, 64], TITLE), "org/draft")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prompt length (tokens)", "tokens per step")
    assert ticks(axes) == [16, 32, 64, 128]
    assert axes.lines[0].get_xydata().tolist() == [[length, 2.25] for length in (16, 32, 64, 128)]
    assert len(axes.collections) == 2 and names(figure) == ["greedy", "sampled"]


def test_there_is_no_plot_of_a_point():
    of_one_head = report([record(0, [2, 1]) | {"correct": [3], "correct_top_k": [4], "counted": [8]}], n_predict=1)
    assert acceptance_report.figure(of_one_head, TITLE) is None
    assert acceptance_report.figure(report([record(0, [])]), TITLE) is None  # no step was made
    assert acceptance_report.figure_of_lengths(report([record(0, [2, 1], category="16 tokens")]), [16], TITLE) is None


def test_an_interrupted_measurement_goes_on(llama, speculator, tmp_path):
    tokenizer = character_tokenizer(eos_token="z")
    asked = [Prompt("", ("abc", "def")), Prompt("", ("g",)), Prompt("", ("hi", "jkl")), Prompt("", ("mnop",))]
    options = {"batch_size": 2, "max_new_tokens": 12, "do_sample": True, "temperature": 1.0}
    whole = RecordFile(tmp_path / "whole.jsonl", {})
    measure_prompts(llama, speculator, tokenizer, asked, whole, **options)
    key = [(row["prompt"], row["turn"]) for row in whole.records]
    assert sorted(key) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0)]
    for kept in range(1, 7):
        lines = whole.path.read_text().splitlines(keepends=True)[: kept + 1]
        (tmp_path / "part.jsonl").write_text("".join(lines))
        part = RecordFile(tmp_path / "part.jsonl", {})
        measure_prompts(llama, speculator, tokenizer, asked, part, **options)
        assert sorted(map(str, part.records)) == sorted(map(str, whole.records))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, speculator):
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama").save_pretrained(folder / "base_model")
    character_tokenizer(eos_token="z").save_pretrained(folder / "base_model")
    speculator.save_pretrained(folder / "speculator")
    return folder


def run(saved, output, *flags):
    models = ["--base_model", saved / "base_model", "--speculator", saved / "speculator"]
    return commands.run(RECIPE, *models, "--output", output, "--max_new_tokens", 12, *flags)


@pytest.mark.parametrize("drafter", [["--speculator", "lookup"], ["--n_lookup_tokens", 8]], ids=str)
def test_the_command_with_lookup(saved, tmp_path, drafter):
    """Alone, where there are no heads whose accuracy could be shown, and in a speculator's tree."""
    (tmp_path / "p.txt").write_text("abcabcabc\nzyxzyxzyxzyx\n")
    flags = ("--prompts", tmp_path / "p.txt", "--max_new_tokens", 60, "--output", tmp_path / "out", *drafter)
    done = run(saved, tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/acceptance.json").read_text())
    assert report["settings"]["n_lookup_tokens"] == len(report["accepted_per_position"]) == 8
    assert report["partings"] == [] and report["tokens_per_step"] > 1.05
    assert len(report["teacher_forced_accuracy"]) == (0 if drafter[0] == "--speculator" else 3)
    assert (tmp_path / "out/acceptance.png").is_file()


def test_the_command(saved, tmp_path):
    rows = [{"prompt": text, "category": category} for text, category in (("abc", "one"), ("d", "two"), ("ef", "one"))]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(saved, tmp_path / "out", "--prompts", tmp_path / "p.jsonl", "--temperature", 1, "--n_candidates", 2)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/acceptance.json").read_text())
    expected = {"tokens_per_step", "accepted_per_position", "prompts", "new_tokens", "teacher_forced_accuracy"}
    assert expected | {"simulated_tokens_per_step", "settings", "machine", "versions", "sampled"} <= report.keys()
    assert report["prompts"] == report["sampled"]["prompts"] == 3
    assert {name: figures["prompts"] for name, figures in report["categories"].items()} == {"one": 2, "two": 1}
    assert report["settings"]["n_candidates"] == 2
    assert report["sampled"]["sampling"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    assert "greedy: 100%" in done.stderr and "sampled: 100%" in done.stderr
    assert f"Written: {tmp_path}/out/acceptance.json" in done.stdout and "benchmark_latency.py" in done.stdout
    assert "| greedy | 3 |" in done.stdout and "| sampled | 3 |" in done.stdout
    assert (tmp_path / "out/acceptance.md").read_text() in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "acceptance.json", "acceptance.md", "acceptance.png", "greedy.jsonl", "sampled.jsonl"
    }  # fmt: skip
    again = run(saved, tmp_path / "out", "--prompts", tmp_path / "p.jsonl", "--temperature", 1)
    assert "was measured with n_candidates=2, not n_candidates=3" in again.stderr
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[0]) + "\n")
    again = run(saved, tmp_path / "out", "--prompts", tmp_path / "p.jsonl", "--n_candidates", 2)
    assert "was measured with texts=" in again.stderr
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abcdef", "bcdefg")))
    cut = run(saved, tmp_path / "cut", "--prompts", tmp_path / "long.jsonl", "--prompt_length", 2, 5)
    assert cut.returncode == 0, cut.stderr
    assert (tmp_path / "cut/acceptance_by_length.png").is_file()
    report = json.loads((tmp_path / "cut/acceptance.json").read_text())
    assert {name: figures["prompts"] for name, figures in report["categories"].items()} == {
        "2 tokens": 2,
        "5 tokens": 2,
    }
    wrong = run(saved, tmp_path / "other", "--prompts", tmp_path / "missing.jsonl")
    assert "there is no such file" in wrong.stderr
