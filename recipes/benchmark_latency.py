"""Speed-up over plain `generate`, method against method: over candidates, batch sizes and lengths of prompts.

python recipes/benchmark_latency.py --base_model outputs/quickstart/base_model \\
    --speculator outputs/quickstart/speculator --prompts outputs/quickstart/corpus/held_out.jsonl \\
    --methods generate prompt_lookup speculator --n_candidates 0 1 2 5 8 --batch_size 1 4 --output outputs/latency

Methods: generate, prompt_lookup, draft_model, early_exit, mtp, dflash, speculator, and other drafters by their names;
`static:` or `compiled:` before generate or a speculator gives it a static cache. What can't run, or fails, has its
reason in its row. Killed and run again, it goes on where it was.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import psutil
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from modeling_speculator.benchmarking import machine, versions
from modeling_speculator.drafters import DRAFTERS
from modeling_speculator.latency import measure_latency
from modeling_speculator.methods import expand_methods
from modeling_speculator.prompts import cut_prompts, read_prompts
from modeling_speculator.records import RecordFile


AXES = ("batch_size", "prompt_length")
COLUMNS = ("method", "n_candidates", "batch_size", "prompt_length", "speedup", "tokens_per_second", "tokens_per_step",
           "first_token_ms", "ms_per_token", "identical_outputs")  # fmt: skip


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    busy = psutil.cpu_percent(interval=1.0) / 100 * psutil.cpu_count()
    if busy > 0.2:
        print(f"WARNING: {busy:.1f} cores are busy with something else. Stop it: its share of the time is not known.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.base_model)
    model = AutoModelForCausalLM.from_pretrained(args.base_model, dtype=args.dtype).eval().to(device)
    paths = dict(drafter.partition("=")[::2] for drafter in args.drafters)
    paths |= {"speculator": args.speculator} if args.speculator else {}
    drafters = {name: load_drafter(path, model) for name, path in paths.items()}
    methods = args.methods or ["generate", "prompt_lookup", *drafters]
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("output", *AXES)}
    file = RecordFile(args.output / "latency.jsonl", settings | {"versions": versions(), "machine": machine()})
    texts = [tokenizer(prompt.turns[0], verbose=False)["input_ids"] for prompt in read_prompts(args.prompts)]
    for batch_size, length in product(args.batch_size, args.prompt_length):
        if any((row["batch_size"], row["prompt_length"]) == (batch_size, length) for row in file.records):
            continue
        n_prompts = max(args.n_prompts, batch_size) // batch_size * batch_size
        prompts = cut_prompts(texts, length, n_prompts).to(device).split(batch_size)
        batches = [(part, torch.ones_like(part)) for part in prompts]
        ways = expand_methods(methods, model, drafters, args.n_candidates, batch_size)
        cell = {"batch_size": batch_size, "prompt_length": length, "new_tokens": args.max_new_tokens}
        rows = measure_latency(model, ways, batches, args.max_new_tokens, args.rounds)
        file.add([row | cell for row in rows])
        print(tabulate(file.records[-len(rows) :]), flush=True)
    rows = file.records
    (args.output / "latency.json").write_text(json.dumps([row | {"machine": machine()} for row in rows], indent=1))
    (args.output / "latency.md").write_text(tabulate(rows))
    plot(rows, args.output / "latency.png")
    print(f"Written: {args.output}/latency.json, .md, .png")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="folder or Hub id")
    parser.add_argument("--speculator", help="folder or Hub id")
    parser.add_argument("--drafters", nargs="*", default=[], metavar="NAME=DIR", help="others, draft_model among them")
    parser.add_argument(
        "--methods", nargs="+", help="the first is compared with; default: generate, prompt_lookup, all"
    )
    parser.add_argument("--n_candidates", type=int, nargs="+", help="default: each speculator's dials")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt_length", type=int, nargs="+", default=[64], help="tokens")
    parser.add_argument("--prompts", required=True, help="file or dataset, see evaluate_acceptance.py")
    parser.add_argument("--n_prompts", type=int, default=8, help="of each cell, cut from the longest texts")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--dtype", default="auto", help="of all models; default: as the base model was saved")
    parser.add_argument("--output", type=Path, required=True, help="folder for latency.json, .md, .png")
    return parser.parse_args()


def load_drafter(path: str, model):
    speculator = type(AutoConfig.from_pretrained(path)) in DRAFTERS
    auto = AutoModel if speculator else AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=model.dtype).eval().to(model.device)


def tabulate(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [f"{row.get(c):.2f}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in COLUMNS]
        if "skipped" in row or "error" in row:
            cells[4] = row.get("skipped") or row["error"].splitlines()[0][:100]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Speed-up over each axis, the others at their first value, candidates at the fastest."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained", sharey=True)
    first = {axis: rows[0][axis] for axis in AXES}
    done = [row for row in rows if "speedup" in row]
    for axes, axis in zip(panels, ("n_candidates", *AXES), strict=True):
        here = [row for row in done if all(row[key] == value for key, value in first.items() if key != axis)]
        for method in dict.fromkeys(row["method"] for row in here):
            best = {}
            for row in (row for row in here if row["method"] == method and axis in row):
                best[row[axis]] = max(row["speedup"], best.get(row[axis], 0))
            axes.plot(*zip(*sorted(best.items()), strict=True) if best else ([], []), "o-", label=method)
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set(xlabel=axis, ylabel="x generate")
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
