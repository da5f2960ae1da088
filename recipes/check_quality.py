"""Is the output the base model's own? The same tokens if greedy, the same distribution and scores if sampled.

python recipes/check_quality.py --base_model outputs/quickstart/base_model \\
    --speculator outputs/quickstart/speculator --prompts HumanEval.jsonl.gz --output outputs/quality.json
"""

import argparse
import json

import torch
from tqdm import tqdm

from modeling_speculator.checks import main_device
from modeling_speculator.command_line import output_file, positive, positive_number, run, say_end
from modeling_speculator.loading import load_base_model, load_speculator
from modeling_speculator.measuring.benchmarking import machine, versions
from modeling_speculator.measuring.parsers import continuing_parser
from modeling_speculator.measuring.prompts import encode, fitting_prompts, pad_left, read_prompts
from modeling_speculator.measuring.quality import compare_greedy, compare_samples, sample


def main() -> None:
    args = parse_args()
    read = read_prompts(args.prompts, args.limit)
    model, tokenizer = load_base_model(args.base_model, args.dtype, args.device_map)
    speculator = load_speculator(args.speculator, model)
    prompts = fitting_prompts(read, tokenizer, model, args.max_new_tokens, args.chat, args.leave_out_long)
    rows = encode(prompts, [[] for _ in prompts], tokenizer, args.chat)
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    options = {"max_new_tokens": args.max_new_tokens, "pad_token_id": 0}
    warpers = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    greedy, plain, ours = [], [], []
    for first in tqdm(range(0, len(order), args.batch_size), desc="comparing", unit="batch"):
        numbers = order[first : first + args.batch_size]
        batch = [part.to(main_device(model)) for part in pad_left([rows[number] for number in numbers])]
        greedy += compare_greedy(model, speculator, *batch, **options)
        asked = [prompts[number] for number in numbers]
        for found, drafter in ((plain, None), (ours, speculator)):
            for draw in range(args.samples):
                torch.manual_seed(args.seed + 2 * (first * args.samples + draw) + (drafter is not None))
                found += sample(model, drafter, tokenizer, asked, *batch, **options, **warpers)
    with_score = ["score" in row for row in plain]
    if not all(with_score):  # some prompts have no answer to compare with
        for row in plain + ours:
            row.pop("score", None)
    report = {
        "prompts": len(prompts),
        "prompts_left_out": len(read) - len(prompts),
        "identical_outputs": sum(outcome.identical for outcome in greedy),
        "differences": [
            {"tokens_per_step": row.tokens_per_step, "position": row.position, "gap": row.gap}
            for row in greedy
            if not row.identical
        ],
        "samples": len(plain),
        "sampled": compare_samples(plain, ours),
        "settings": {key: str(value) for key, value in vars(args).items() if key != "output"},
        "versions": versions(),
        "machine": machine(),
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    say_end(args.output)


def show(report: dict) -> None:
    print(
        f"Greedy: {report['identical_outputs']} of {report['prompts']} outputs are the base model's, token for token."
    )
    for row in report["differences"]:
        print(f"  other from token {row['position']} on, where the first two choices are {row['gap']:.1e} apart")
    print(f"Sampled, {report['samples']} texts each:\n{'':18}{'plain':>10}{'speculative':>13}{'p':>8}")
    for name, row in report["sampled"].items():
        print(f"{name:18}{row['plain']:10.3f}{row['speculative']:13.3f}{row['p_value']:8.2f}")


def parse_args() -> argparse.Namespace:
    parser = continuing_parser(__doc__)
    parser.add_argument("--output", type=output_file, required=True, metavar="FILE", help="JSON, for the results")
    parser.add_argument(
        "--samples", type=positive, default=2, metavar="TEXTS", help="per prompt, plainly and with the speculator"
    )
    parser.add_argument(
        "--temperature", type=positive_number, default=1.0, metavar="NUMBER", help="of what is sampled"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
