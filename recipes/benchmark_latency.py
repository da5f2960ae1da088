"""Speed-up over plain `generate`, method against method: over candidates, batch sizes and lengths of prompts.

python recipes/benchmark_latency.py --base_model outputs/quickstart/base_model \\
    --speculator outputs/quickstart/speculator --prompts outputs/quickstart/corpus/held_out.jsonl \\
    --methods generate prompt_lookup speculator --n_candidates 0 1 2 5 8 --batch_size 1 4 --output outputs/latency

Methods: generate, prompt_lookup, draft_model, early_exit, mtp, dflash of transformers; speculator, and other drafters
by their names; lookup, which is prompt lookup by this loop, and speculator+lookup, both in one tree. `static:` or
`compiled:` before generate or any of this loop gives it a static cache. What can't run, or fails, has its
reason in its row. Killed and run again, it goes on where it was.
"""

import argparse
import json
from functools import partial
from itertools import product

import torch

from modeling_speculator.checks import main_device
from modeling_speculator.command_line import GOES_ON, command_of, count, named_folder, output_folder, run, say_end
from modeling_speculator.drafters import dials_of, is_drafter
from modeling_speculator.loading import load_base_model, load_drafter
from modeling_speculator.measuring import plots
from modeling_speculator.measuring.benchmarking import digest, machine, versions, warn_of_other_work
from modeling_speculator.measuring.latency import measure_latency
from modeling_speculator.measuring.latency_report import figure, page, short_table
from modeling_speculator.measuring.methods import expand_methods
from modeling_speculator.measuring.parsers import timing_parser
from modeling_speculator.measuring.prompts import check_context, cut_prompts, digest_of, read_prompts
from modeling_speculator.measuring.records import RecordFile


AXES = ("batch_size", "prompt_length")


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    warn_of_other_work()
    model, tokenizer = load_base_model(args.base_model, args.dtype, args.device_map)
    paths = dict(drafter.partition("=")[::2] for drafter in args.drafters)
    paths |= {"speculator": args.speculator} if args.speculator else {}
    drafters = {name: load_drafter(path, model) for name, path in paths.items()}
    methods = ["generate", *(name for name in args.methods or ["prompt_lookup", *drafters] if name != "generate")]
    expand_methods(methods, model, drafters)  # knows them all
    prompts = read_prompts(args.prompts)
    texts = [tokenizer(prompt.turns[0], verbose=False)["input_ids"] for prompt in prompts]
    settings = {key: value for key, value in vars(args).items() if key not in ("output", *AXES)}
    settings |= {"dials": {name: dials_of(each) for name, each in drafters.items() if is_drafter(each)}}
    weights = {name: digest(each) for name, each in drafters.items()}
    base_weights = digest(model)
    settings |= {"weights": [base_weights, *weights.values()], "texts": digest_of(prompts)}
    settings |= {"versions": versions(), "machine": machine(with_date=False)}
    cells = cut_cells(args, model, tokenizer, texts)
    file = RecordFile(args.output / "latency.jsonl", settings)
    for number, ((batch_size, length), rows) in enumerate(cells.items(), start=1):
        print(f"\nLoad {number} of {len(cells)}: batches of {batch_size}, prompts of {length} tokens", flush=True)
        cell = {"batch_size": batch_size, "prompt_length": length, "new_tokens": args.max_new_tokens}
        if any(record["cell"] == cell for record in file.records):
            continue
        if isinstance(rows, str):  # the other cells go on
            file.add([{"cell": cell, "rows": [cell | {"method": name, "error": rows} for name in methods]}])
            continue
        batches = [(part, torch.ones_like(part)) for part in rows.split(batch_size)]
        ways = expand_methods(methods, model, drafters, args.n_candidates, batch_size)
        measured = measure_latency(model, ways, batches, args.max_new_tokens, args.rounds)
        about = {"base_model": args.base_model, "base_model_weights": base_weights, "dtype": str(model.dtype)}
        about |= {"versions": versions(), "machine": machine()}
        for row in measured:
            row |= cell | about
            if (drafter := row["method"].rpartition(":")[2]) in weights:
                row["weights"] = weights[drafter]
        file.add([{"cell": cell, "rows": measured}])
        print(short_table(measured), flush=True)
    rows = [row for record in file.records for row in record["rows"]]
    (args.output / "latency.json").write_text(json.dumps(rows, indent=1) + "\n")
    models = {"base model": args.base_model} | paths
    about = {"models": models, "dtype": str(model.dtype), "machine": machine(), "versions": versions()}
    (args.output / "latency.md").write_text(page(rows, args.rounds, **about))
    title = plots.title("Speed-up over plain generate", models, machine())
    drawn = plots.write(args.output, {"latency.png": partial(figure, rows, title)})
    flags = {"base_model": args.base_model, "speculator": args.speculator, "prompts": args.prompts}
    dials = command_of("tune.py", **flags, batch_size=args.batch_size, output=args.output.with_name("tuning"))
    written = [args.output / name for name in ("latency.json", "latency.md", *drawn)]
    say_end(*written, then={"which dials are best": dials} if args.speculator else {})


def parse_args() -> argparse.Namespace:
    parser = timing_parser(__doc__, n_prompts=8, max_new_tokens=100, rounds=5, needs_speculator=False)
    parser.add_argument(
        "--drafters", type=named_folder, nargs="*", default=[], metavar="NAME=DIR", help="others (default: none)"
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="beside generate (default: prompt_lookup and all drafters)"
    )
    parser.add_argument(
        "--n_candidates", type=count, nargs="+", metavar="CANDIDATES", help="per step (default: each drafter's dials)"
    )
    parser.add_argument(
        "--output", type=output_folder, required=True, metavar="FOLDER", help="for latency.json, .md, .png"
    )
    return parser.parse_args()


def cut_cells(args, model, tokenizer, texts: list[list[int]]) -> dict[tuple[int, int], torch.Tensor | str]:
    """Prompts by batch size and length, or why there are none; a ValueError where there are none at all."""
    cells = {}
    for batch_size, length in product(args.batch_size, args.prompt_length):
        n_prompts = max(args.n_prompts, batch_size) // batch_size * batch_size
        possible = [n for n in args.prompt_length if sum(len(text) >= n for text in texts) >= n_prompts]
        try:
            check_context(model, length + args.max_new_tokens)
            rows = cut_prompts(texts, length, n_prompts, max(possible, default=0), tokenizer.bos_token_id)
            cells[batch_size, length] = rows.to(main_device(model))
        except ValueError as error:
            cells[batch_size, length] = str(error)
    if all(isinstance(prompts, str) for prompts in cells.values()):
        raise ValueError(next(iter(cells.values())))
    return cells


if __name__ == "__main__":
    run(main, GOES_ON)
