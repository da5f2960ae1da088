"""The table of drafters, from a sweep and timings."""

import json
from pathlib import Path

import commands


SCRIPT = Path(__file__).parents[1] / "recipes/field_table.py"


def timing(method, n_candidates=None, tokens_per_step=2.0, ms_per_token=1.0):
    row = {"method": method, "tokens_per_step": tokens_per_step, "ms_per_token": ms_per_token, "speedup": 1.5}
    row |= {"tokens_per_second": 1000 / ms_per_token, "base_model": "base", "versions": {"torch": "2.13.0"}}
    row |= {"machine": {"processor": "a CPU", "threads": 1, "date": "2026-01-02"}}
    return row | ({} if n_candidates is None else {"n_candidates": n_candidates})


def test_each_drafter_has_its_own_figures(tmp_path):
    """Also where one's name is another's with a sign after it."""
    trained = {"parameters": 1_000_000, "greedy": 2.0, "sampled": 1.5, "seed": 0, "training_seconds": 60}
    rows = [trained | {"variant": name} for name in ("Hydra", "Hydra++")]
    (tmp_path / "sweep.json").write_text(json.dumps({"command": "python sweep", "rows": rows}))
    timings = [timing("hydra", 0, 1.0, 2.0), timing("hydra", 1, 2.0, 1.5), timing("hydraplus", 5, 3.0)]
    timings += [timing("hydraplus+lookup", 5, 4.0), timing("lookup", 1, 1.6), timing("generate", None, None, 3.0)]
    (tmp_path / "latency.json").write_text(json.dumps(timings))
    flags = ("--sweep", tmp_path / "sweep.json", "--latency", tmp_path / "latency.json", "--output", tmp_path / "out")
    done = commands.run(SCRIPT, *flags)
    assert done.returncode == 0, done.stderr
    hydra, plus, lookup, _ = json.loads((tmp_path / "out/field.json").read_text())["rows"]
    assert hydra["chain"]["tokens_per_step"] == 2.0 and not {"tree", "tree+lookup"} & hydra.keys()
    assert hydra["chain"]["milliseconds_beyond_plain"] == 1.0  # 2 * 1.5 - 1 * 2
    assert (plus["tree"]["tokens_per_step"], plus["tree+lookup"]["tokens_per_step"]) == (3.0, 4.0)
    assert lookup["lookup"]["tokens_per_step"] == 1.6
    assert "| Hydra++ | 1.00 | 60 | 2.00, 1.50 |" in (tmp_path / "out/field.md").read_text()
    assert (tmp_path / "out/field.png").is_file()
