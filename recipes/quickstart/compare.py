"""Continues held-out prompts plainly and with a speculator, and reports what the speculator gains.

python recipes/quickstart/compare.py --base_model X --speculator Y --held_out corpus/held_out.jsonl --output_dir DIR
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from modeling_speculator import SpeculationStatistics
from modeling_speculator.command_line import parser_of, positive, run, say_end
from modeling_speculator.loading import load_base_model, load_speculator
from modeling_speculator.measuring import benchmarking, plots
from modeling_speculator.measuring.evaluation import generate_greedily, loops
from modeling_speculator.measuring.quality import GreedyOutcome, compare_greedy
from modeling_speculator.precision import PRECISIONS, resolve_precision


ROUNDS = 3


def main() -> None:
    args = parse_args()
    dtype = resolve_precision(args.precision) if args.precision else "auto"
    model, tokenizer = load_base_model(args.base_model, dtype)
    speculator = load_speculator(args.speculator, model)
    prompts = cut_prompts(args, tokenizer, model.device)

    def compare(speculator, label: str) -> list[GreedyOutcome]:
        compared = []
        for prompt in tqdm(prompts, desc=label, unit="prompt"):
            mask = torch.ones_like(prompt)
            compared += compare_greedy(model, speculator, prompt, mask, max_new_tokens=args.max_new_tokens)
        return compared

    before = compare(load_speculator(args.stage1, model), "after stage 1") if args.stage1 else None
    outcomes = compare(speculator, "speculative")

    def generate_all(**options) -> int:
        outputs = [generate_greedily(model, prompt, args.max_new_tokens, **options) for prompt in prompts]
        return sum(out.shape[1] - prompt.shape[1] for out, prompt in zip(outputs, prompts, strict=True))

    rates = benchmarking.time_in_turn(
        {"base": generate_all, "speculative": lambda: generate_all(assistant_model=speculator)}, ROUNDS
    )
    written = write_report(args, str(model.dtype), before, outcomes, rates)
    show(*max(zip(prompts, outcomes, strict=True), key=lambda pair: pair[1].distinct_4grams), tokenizer)
    say_end(*(args.output_dir / name for name in written))


def parse_args() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--base_model", required=True, metavar="FOLDER_OR_ID", help="the model to speed up")
    parser.add_argument("--speculator", required=True, metavar="FOLDER_OR_ID", help="a speculator for it")
    parser.add_argument("--stage1", metavar="FOLDER", help="the same one after stage 1, to compare (default: none)")
    parser.add_argument(
        "--held_out", type=Path, required=True, metavar="FILE", help="jsonl with `text`, to cut prompts from"
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="FOLDER", help="for report.json, acceptance.png"
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="fast: measured (default: as the model was saved)")
    parser.add_argument(
        "--prompts", type=positive, default=24, metavar="PROMPTS", help="at most; one of each held-out file"
    )
    parser.add_argument("--prompt_length", type=positive, default=64, metavar="TOKENS", help="of a prompt")
    parser.add_argument("--max_new_tokens", type=positive, default=32, metavar="TOKENS", help="after each prompt")
    return parser.parse_args()


def cut_prompts(args, tokenizer, device: torch.device) -> list[torch.Tensor]:
    """From the middle of each held-out file that is long enough, `prompt_length` tokens."""
    texts = [json.loads(line)["text"] for line in open(args.held_out)]
    rows = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    middles = [row[len(row) // 2 :][: args.prompt_length] for row in rows if len(row) > 4 * args.prompt_length]
    if not middles:
        raise ValueError(
            f"No text in {args.held_out} has more than {4 * args.prompt_length} tokens: give longer ones."
        )
    return [torch.tensor([row], device=device) for row in middles[: args.prompts]]


def show(prompt: torch.Tensor, outcome: GreedyOutcome, tokenizer) -> None:
    """Prints a continuation, with the tokens that were accepted from the draft in green."""
    print("\nA prompt of a held-out file, and its continuation; green: drafted and accepted.\n")
    print(f"\033[2m{tokenizer.decode(prompt[0])}\033[0m", end="")
    tokens = iter(outcome.continuation)
    print(tokenizer.decode([next(tokens)]), end="")
    for emitted in outcome.speculation.emitted_per_step:
        accepted = [next(tokens) for _ in range(emitted - 1)]
        print(f"\033[32m{tokenizer.decode(accepted)}\033[0m{tokenizer.decode([next(tokens)])}", end="")
    print("\n")


def pool(outcomes: list[GreedyOutcome]) -> SpeculationStatistics:
    return SpeculationStatistics.pool(outcome.speculation for outcome in outcomes)


def write_report(args, dtype: str, before: list | None, outcomes: list[GreedyOutcome], rates: dict) -> list[str]:
    """Writes report.json and acceptance.png, and prints the figures; the names of what was written."""
    stages = {"after stage 1": pool(before), "after stage 2": pool(outcomes)} if before else {"": pool(outcomes)}
    varied = [outcome for outcome in outcomes if not loops(outcome.continuation)]
    distinct = [outcome.distinct_4grams for outcome in outcomes]
    report = {
        "prompts": len(outcomes),
        "identical_outputs": sum(outcome.identical for outcome in outcomes),
        "tokens_per_step_stage1": pool(before).tokens_per_step if before else None,
        "tokens_per_step": pool(outcomes).tokens_per_step,
        "tokens_per_step_without_loops": pool(varied).tokens_per_step if varied else None,
        "prompts_without_loops": len(varied),
        "accepted_per_position": pool(outcomes).accepted_per_position,
        "base_tokens_per_second": statistics.median(rates["base"]),
        "speculative_tokens_per_second": statistics.median(rates["speculative"]),
        "speedup": benchmarking.speedup(rates, of="speculative", over="base"),
        "median_distinct_4grams": statistics.median(distinct),
        "distinct_4grams": distinct,
        "rates": rates,
        "base_model": args.base_model,
        "speculator": args.speculator,
        "dtype": dtype,
        "max_new_tokens": args.max_new_tokens,
        "versions": benchmarking.versions(),
        "machine": benchmarking.machine(),
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    models = {"base model": args.base_model, "speculator": args.speculator}
    title = plots.title("Acceptance, by position", models, report["machine"])
    drawn = plots.write(args.output_dir, {"acceptance.png": partial(by_position, stages, title)})
    for key in list(report)[:11]:
        value = report[key]
        print(f"{key:32}{[round(v, 3) for v in value] if isinstance(value, list) else value and round(value, 3)}")
    print(
        f"\n{len(outcomes) - len(varied)} of {len(outcomes)} continuations loop (half or more of their 4-grams are "
        "repetitions). A loop is easy to guess and flatters every speculator: see tokens_per_step_without_loops."
    )
    return ["report.json", *drawn]


def by_position(stages: dict[str, SpeculationStatistics], title: str):
    """What is accepted by position, after each stage; None for a single head."""
    heads = range(1, next(iter(stages.values())).n_predict + 1)
    if len(heads) == 1:
        return None
    figure, (axes,) = plots.panels(title)
    for number, (stage, found) in enumerate(stages.items()):
        label = ": ".join(filter(None, [stage, f"{found.tokens_per_step:.2f} tokens per step"]))
        plots.line(axes, zip(heads, found.accepted_per_position, strict=True), number, label)
    plots.whole_numbers(axes, heads)
    axes.set(xlabel="drafted token", ylabel="share of steps that emit it", ylim=(0, 1.03))
    plots.legend(figure)
    return figure


if __name__ == "__main__":
    run(main)
