"""Will a speculator help on this machine, at this load, and with which dials?

python recipes/tune.py --base_model outputs/quickstart/base_model --speculator outputs/quickstart/speculator \\
    --prompts outputs/quickstart/corpus/held_out.jsonl --batch_size 1 2 4 8 --output outputs/tuning

Measures what steps cost and what drafts yield, predicts the tokens per second of every choice, runs the fastest, to
say how wrong the prediction was, and recommends the best of what was run. --write puts the dials into the speculator's
config.json. Killed and run again, it goes on where it was.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from modeling_speculator.checks import main_device
from modeling_speculator.command_line import GOES_ON, check_writable, output_folder, run, same_command, say_end
from modeling_speculator.configuration_mlp_speculator import DIALS
from modeling_speculator.loading import load_base_model, load_speculator
from modeling_speculator.measuring.benchmarking import digest, machine, versions
from modeling_speculator.measuring.latency import BETWEEN
from modeling_speculator.measuring.parsers import timing_parser
from modeling_speculator.measuring.prompts import check_context, cut_prompts, digest_of, read_prompts
from modeling_speculator.measuring.records import RecordFile
from modeling_speculator.measuring.tuning import MEASURED_PROMPTS, tune


AXES = ("batch_size", "prompt_length")


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    prompts = read_prompts(args.prompts)
    model, tokenizer = load_base_model(args.base_model, args.dtype, args.device_map)
    speculator = load_speculator(args.speculator, model)
    check_context(model, max(args.prompt_length) + args.max_new_tokens)
    texts = [tokenizer(prompt.turns[0], verbose=False)["input_ids"] for prompt in prompts]
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("output", *AXES, "write")}
    settings |= {dial: getattr(speculator.config, dial) for dial in DIALS}
    settings |= {"weights": [digest(model), digest(speculator)], "texts": digest_of(prompts)}
    settings |= {"measured_prompts": MEASURED_PROMPTS, "between": BETWEEN}
    file = RecordFile(args.output / "tuning.jsonl", settings | {"machine": machine(with_date=False)})
    loads = list(product(args.batch_size, args.prompt_length))
    for number, (batch_size, length) in enumerate(loads, start=1):
        print(f"\nLoad {number} of {len(loads)}: batches of {batch_size}, prompts of {length} tokens", flush=True)
        if (batch_size, length) not in {load_of(record) for record in file.records}:
            n_prompts = -(-args.n_prompts // batch_size) * batch_size
            rows = cut_prompts(texts, length, n_prompts, max(args.prompt_length), tokenizer.bos_token_id)
            rows = rows.to(main_device(model))
            file.add([tune(model, speculator, rows, batch_size, args.max_new_tokens, args.rounds)])
        show(next(record for record in file.records if load_of(record) == (batch_size, length)))
    records = [record for load in loads for record in file.records if load_of(record) == load]
    report = {"settings": settings, "loads": records, "versions": versions(), "machine": machine()}
    (args.output / "tuning.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(records, args.output / "tuning.png")
    written, then = [f"{args.output}/tuning.json, .png"], {}
    if args.write:
        speculator.config.update(records[0]["recommended"])
        speculator.config.save_pretrained(args.speculator)
        written.append(f"{args.speculator}/config.json with the recommended dials")
    elif len(loads) == 1 and Path(args.speculator).is_dir():
        then["put the recommended dials into the speculator's config"] = f"{same_command()} --write"
    say_end(*written, then=then)


def parse_args() -> argparse.Namespace:
    parser = timing_parser(__doc__, n_prompts=16, max_new_tokens=64, rounds=3)
    parser.add_argument("--output", type=output_folder, required=True, metavar="FOLDER", help="for tuning.json, .png")
    parser.add_argument("--write", action="store_true", help="put what is recommended into the speculator's config")
    args = parser.parse_args()
    if args.write and (len(args.batch_size) * len(args.prompt_length) > 1 or not Path(args.speculator).is_dir()):
        parser.error("--write needs one --batch_size and --prompt_length, and a speculator in a folder of yours.")
    if args.max_new_tokens < 2:  # of which the first is the prefill's
        parser.error("--max_new_tokens is at least 2")
    if args.write:
        check_writable(Path(args.speculator))
    return args


def load_of(record: dict) -> tuple[int, int]:
    return record["batch_size"], record["context"]


def best_speedup(record: dict) -> float:
    """Of what was measured, plain decoding included."""
    return max(1.0, *(row["measured_speedup"] for row in record["verified"]))


def show(record: dict) -> None:
    costs = {name: round(value, 3) for name, value in record["cost_ms"].items()}
    print(f"Batch {record['batch_size']}, context {record['context']}: a step costs {costs} ms.")
    print(f"Plain decoding: {record['plain_tokens_per_second']:.0f} tokens/s. Predicted, the fastest first:")
    for row in record["predictions"][:5]:
        print(
            f"  {dials(row):44}{row['tokens_per_second']:8.0f} tokens/s, {row['speedup']:.2f} x, "
            f"{row['tokens_per_step']:.2f} tokens per step ({row['break_even_tokens_per_step']:.2f} to break even)"
        )
    for row, name in zip(record["verified"], ("the first of these", "its own dials"), strict=False):
        print(
            f"Measured, {name}, {dials(row)}: {row['measured_tokens_per_second']:.0f} tokens/s, "
            f"{row['measured_speedup']:.2f} x; the prediction was off by {row['prediction_error']:+.1%}, of the "
            f"speed-up by {row['speedup_error']:+.1%}."
        )
    print(f"Recommended: {dials(record['recommended'])}.")


def dials(row: dict) -> str:
    if row["n_candidates"] == 0:
        return "no speculation"
    tree = f"n_tree_nodes={row['n_tree_nodes']}" if row["n_tree_nodes"] else f"n_candidates={row['n_candidates']}"
    return f"{tree} of {row['top_k_tokens_per_head'][: row['n_heads']]}"


def plot(records: list[dict], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for at, record in enumerate(records):
        rows = [row for row in record["predictions"] if row["n_tree_nodes"] and row["n_heads"] is None]
        rows.sort(key=lambda row: row["n_tree_nodes"])
        points = [[row[key] for row in rows] for key in ("n_tree_nodes", "speedup")]
        left.plot(*points, f"C{at}.-", label=f"batch {record['batch_size']}, context {record['context']}")
    left.set(xlabel="n_tree_nodes", ylabel="predicted, x generate")
    left.legend(fontsize="small")
    loads = [record["plain_tokens_per_second"] for record in records]
    right.plot(loads, [record["predictions"][0]["speedup"] for record in records], "o--", label="predicted")
    right.plot(loads, [best_speedup(record) for record in records], "o-", label="measured")
    for load, record in zip(loads, records, strict=True):
        right.annotate(f"batch {record['batch_size']}", (load, best_speedup(record)), fontsize="small")
    right.set(xlabel="plain generate, tokens per second", ylabel="recommended dials, x generate")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.axhline(1, color="gray", linewidth=0.8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run(main, GOES_ON)
