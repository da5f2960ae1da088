"""Will a speculator help on this machine, at this load, and with which dials?

python recipes/tune.py --base_model outputs/quickstart/base_model --speculator outputs/quickstart/speculator \\
    --prompts outputs/quickstart/corpus/held_out.jsonl --batch_size 1 2 4 8 --output outputs/tuning

Measures what steps cost and what drafts yield, predicts the tokens per second of every choice, runs the fastest, to
say how wrong the prediction was, and recommends the best of what was run. --write puts the dials into the speculator's
config.json. Killed and run again, it goes on where it was.
"""

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path

import torch

from modeling_speculator.checks import main_device
from modeling_speculator.command_line import GOES_ON, check_writable, output_folder, run, same_command, say_end
from modeling_speculator.configuration_mlp_speculator import DIALS
from modeling_speculator.loading import load_base_model, load_speculator
from modeling_speculator.measuring import plots, tuning_report
from modeling_speculator.measuring.benchmarking import digest, machine, versions
from modeling_speculator.measuring.latency import BETWEEN
from modeling_speculator.measuring.parsers import timing_parser
from modeling_speculator.measuring.prompts import check_context, cut_prompts, digest_of, read_prompts
from modeling_speculator.measuring.records import RecordFile
from modeling_speculator.measuring.tuning import MEASURED_PROMPTS, tune
from modeling_speculator.measuring.tuning_report import load_of


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
        record = next(record for record in file.records if load_of(record) == (batch_size, length))
        print(tuning_report.lines(record), flush=True)
    records = [record for load in loads for record in file.records if load_of(record) == load]
    report = {"settings": settings, "loads": records, "dtype": str(model.dtype)}
    report |= {"versions": versions(), "machine": machine()}
    (args.output / "tuning.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.output / "tuning.md").write_text(tuning_report.page(report))
    models = {"base model": args.base_model, "speculator": args.speculator}
    title = plots.title("Speed-up over plain generate, predicted and measured", models, report["machine"])
    drawn = plots.write(args.output, {"tuning.png": partial(tuning_report.figure, records, title)})
    written, then = [args.output / name for name in ("tuning.json", "tuning.md", *drawn)], {}
    if args.write:
        speculator.config.update(records[0]["recommended"])
        speculator.config.save_pretrained(args.speculator)
        written.append(f"{args.speculator}/config.json with the recommended dials")
    elif len(loads) == 1 and Path(args.speculator).is_dir():
        then["put the recommended dials into the speculator's config"] = f"{same_command()} --write"
    say_end(*written, then=then)


def parse_args() -> argparse.Namespace:
    parser = timing_parser(__doc__, n_prompts=16, max_new_tokens=64, rounds=3)
    parser.add_argument(
        "--output", type=output_folder, required=True, metavar="FOLDER", help="for tuning.json, .md, .png"
    )
    parser.add_argument("--write", action="store_true", help="put what is recommended into the speculator's config")
    args = parser.parse_args()
    if args.write and (len(args.batch_size) * len(args.prompt_length) > 1 or not Path(args.speculator).is_dir()):
        parser.error("--write needs one --batch_size and --prompt_length, and a speculator in a folder of yours.")
    if args.max_new_tokens < 2:  # of which the first is the prefill's
        parser.error("--max_new_tokens is at least 2")
    if args.write:
        check_writable(Path(args.speculator))
    return args


if __name__ == "__main__":
    run(main, GOES_ON)
