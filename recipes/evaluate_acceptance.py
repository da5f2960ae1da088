"""How many tokens a step yields on your prompts, by category, beside what the heads' accuracy promises.

python recipes/evaluate_acceptance.py --base_model outputs/quickstart/base_model \\
    --speculator outputs/quickstart/speculator --prompts HumanEval.jsonl.gz --output outputs/acceptance
python recipes/evaluate_acceptance.py --base_model meta-llama/Llama-2-13b-chat-hf \\
    --speculator ibm-ai-platform/llama-13b-accelerator --prompts question.jsonl --chat --temperature 1 --output DIR

With `--speculator lookup` prompt lookup is measured, which needs none.

Prompts: text (one a line), jsonl with `prompt`, Spec-Bench's, HumanEval's or GSM8K's files, or a dataset of the Hub.
Killed and run again, it goes on where it was.
"""

import argparse
import json
from functools import partial

from modeling_speculator.command_line import (
    GOES_ON,
    command_of,
    count,
    output_folder,
    positive,
    run,
    say_end,
    temperature,
)
from modeling_speculator.configuration_mlp_speculator import DIALS
from modeling_speculator.drafters import dials_of
from modeling_speculator.loading import load_base_model, load_speculator_or_lookup
from modeling_speculator.lookup import longest_draft
from modeling_speculator.measuring import acceptance_report, plots
from modeling_speculator.measuring.acceptance import measure_prompts, summarize_categories
from modeling_speculator.measuring.benchmarking import digest, machine, versions
from modeling_speculator.measuring.parsers import continuing_parser
from modeling_speculator.measuring.prompts import digest_of, fitting_prompts, prompts_of_lengths, read_prompts
from modeling_speculator.measuring.records import RecordFile


def main() -> None:
    args = parse_args()
    read = read_prompts(args.prompts, None if args.prompt_length else args.limit)
    model, tokenizer = load_base_model(args.base_model, args.dtype, args.device_map)
    speculator = load_speculator_or_lookup(args.speculator, model)
    dials = {dial: getattr(args, dial) for dial in DIALS if getattr(args, dial) is not None}
    if "n_candidates" in dials:  # which counts where `n_tree_nodes` is not set
        dials.setdefault("n_tree_nodes", None)
    vars(speculator.config).update(dials)
    if args.prompt_length:
        read = prompts_of_lengths(read, args.prompt_length, tokenizer, args.limit)
    prompts = fitting_prompts(read, tokenizer, model, args.max_new_tokens, args.chat, args.leave_out_long)
    names = ("base_model", "speculator", "prompts", "max_new_tokens", "batch_size", "seed", "chat")
    settings = {name: getattr(args, name) for name in names} | {"dtype": str(model.dtype)}
    settings |= dials_of(speculator)
    settings |= {"weights": [digest(model), digest(speculator)], "texts": digest_of(prompts)}

    modes = {"greedy": {"do_sample": False}}
    if args.temperature:
        warpers = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
        modes["sampled"] = {"do_sample": True} | warpers
    report = {}
    for mode, options in modes.items():
        file = RecordFile(args.output / f"{mode}.jsonl", settings | options)
        options |= {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
        measure_prompts(model, speculator, tokenizer, prompts, file, chat=args.chat, seed=args.seed, **options)
        report[mode] = summarize_categories(file.records, longest_draft(speculator.config))
        report[mode]["prompts_left_out"] = len(read) - len(prompts)
        report[mode]["sampling"] = warpers if mode == "sampled" else None
    # At the top what is greedy, and beside it what is sampled.
    report = report.pop("greedy") | report | {"settings": settings, "versions": versions(), "machine": machine()}
    (args.output / "acceptance.json").write_text(json.dumps(report, indent=1) + "\n")
    page = acceptance_report.page(report)
    (args.output / "acceptance.md").write_text(page)
    models = {"base model": args.base_model, "speculator": args.speculator}
    title = plots.title("Acceptance, by position", models, report["machine"])
    drawings = {"acceptance.png": partial(acceptance_report.figure, report, title)}
    if args.prompt_length:
        title = plots.title("Acceptance, by length of the prompt", models, report["machine"])
        drawing = partial(acceptance_report.figure_of_lengths, report, args.prompt_length, title)
        drawings["acceptance_by_length.png"] = drawing
    drawn = plots.write(args.output, drawings)
    print(f"\n{page}")
    drafter = {"methods": ["lookup"]} if args.speculator == "lookup" else {"speculator": args.speculator}
    flags = {"base_model": args.base_model, "prompts": args.prompts} | drafter
    then = command_of("benchmark_latency.py", **flags, output=args.output.with_name("latency"))
    written = [args.output / name for name in ("acceptance.json", "acceptance.md", *drawn)]
    say_end(*written, then={"how fast that is": then})


def parse_args() -> argparse.Namespace:
    parser = continuing_parser(__doc__)
    parser.add_argument(
        "--output", type=output_folder, required=True, metavar="FOLDER", help="for acceptance.json, .md, .png"
    )
    parser.add_argument(
        "--prompt_length", type=positive, nargs="+", default=[], metavar="TOKENS", help="cut to (default: as they are)"
    )
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, metavar="NUMBER", help="above 0: sampled, too; 0: greedy only"
    )
    own = "(default: the speculator's own)"
    parser.add_argument("--n_candidates", type=count, metavar="CANDIDATES", help=f"per step; 0: no speculation {own}")
    parser.add_argument("--n_tree_nodes", type=positive, metavar="NODES", help=f"per step {own}")
    parser.add_argument("--n_heads", type=positive, metavar="HEADS", help=f"that draft {own}")
    parser.add_argument("--n_lookup_tokens", type=count, metavar="TOKENS", help=f"of a lookup branch; 0: none {own}")
    parser.add_argument(
        "--top_k_tokens_per_head", type=positive, nargs="+", metavar="TOKENS", help=f"children per node {own}"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main, GOES_ON)
