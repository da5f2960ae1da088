"""Ways to decode faster, on one base model: drafters are trained on the same data at the same cost, and all compared.

python recipes/head_to_head.py --base_model outputs/quickstart/base_model --corpus outputs/quickstart/corpus \\
    --output_dir outputs/head_to_head

An hour and a half on two CPU cores with bf16 units and nothing else running. Killed and run again, it goes on. Each
training of the drafters keeps its output in a log.txt, whose path is printed when it begins.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from modeling_speculator import command_line
from modeling_speculator.command_line import positive
from modeling_speculator.loading import base_model_config
from modeling_speculator.precision import PRECISIONS, keep_precision


RECIPES = Path(os.path.relpath(Path(__file__).parent))  # as it is written into results
SWEEP = RECIPES / "sweeps/drafters.yaml"
# What is timed of what was trained: each drafter with the better loss, of the first seed.
TIMED = {
    "speculator": "speculator,_KL-0",
    "medusa": "Medusa_heads,_KL-0",
    "unconditioned": "without_tokens,_KL-0",
    "recurrent": "recurrent_drafter,_KL-0",
}
CACHES = [f"{form}:{method}" for form in ("static", "compiled") for method in ("generate", "speculator")]


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument("--base_model", type=Path, required=True, metavar="FOLDER", help="the model to speed up")
    parser.add_argument(
        "--corpus", type=Path, required=True, metavar="FOLDER", help="of write_corpus.py: train, held_out.jsonl"
    )
    parser.add_argument(
        "--output_dir", type=command_line.output_folder, required=True, metavar="FOLDER", help="for all that is made"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="to measure on (default: the corpus's held-out texts)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fast", help="to train and to measure in")
    parser.add_argument(
        "--inner_dim", type=positive, metavar="WIDTH", help="of the speculators (default: sweeps/stage1.yaml's)"
    )
    several = {"nargs": "+", "type": positive}
    candidates = several | {"type": command_line.count, "default": [0, 1, 2, 5, 8, 16, 32]}
    parser.add_argument("--n_candidates", **candidates, metavar="CANDIDATES", help="per step, to measure with")
    parser.add_argument("--batch_size", **several, default=[1, 2, 4], metavar="PROMPTS", help="continued at once")
    lengths = [16, 32, 64, 128, 256, 400]
    parser.add_argument("--prompt_length", **several, default=lengths, metavar="TOKENS", help="of a prompt")
    parser.add_argument("--max_new_tokens", type=positive, default=64, metavar="TOKENS", help="after each prompt")
    args = parser.parse_args()
    width_of_base = base_model_config(str(args.base_model)).hidden_size
    commands = list(commands_of(args, width_of_base, keep_precision(args.output_dir, args.precision)))
    for number, (script, flags) in enumerate(commands, start=1):
        print(f"\n== {number} of {len(commands)}: {command_line.command_of(script, **flags)}", flush=True)
        if command_line.run_script(RECIPES / script, *command_line.flags_of(**flags)):
            sys.exit(f"recipes/{script} failed. The same command, run again, goes on from what is on disk.")
    command_line.say_end(
        args.output_dir / "drafters.json", *(flags["output"] for _, flags in commands if "output" in flags)
    )


def commands_of(args: argparse.Namespace, width_of_base: int, precision: str) -> Iterator[tuple[str, dict]]:
    """The scripts that are run, each with its flags."""
    folder, model = args.output_dir, {"base_model": args.base_model}
    trained = folder / "drafters"
    width = {"inner_dim": args.inner_dim} if args.inner_dim else {}
    yield command("sweep.py", **model, variants=SWEEP, corpus=args.corpus, **width, output_dir=trained,
                  precision=precision, results=folder / "drafters.json")  # fmt: skip
    draft_model = folder / "draft_model"
    if not (draft_model / "trainer_state.json").is_file():  # what the training writes last
        text = {"corpus": args.corpus / "train.jsonl", "tokenizer": args.base_model, "precision": precision}
        width = {"num_hidden_layers": 1, "hidden_size": width_of_base}
        yield command("quickstart/train_base_model.py", **text, output_dir=draft_model, **width)

    drafters = {name: trained / variant / "stage2" for name, variant in TIMED.items()}
    model |= {"speculator": drafters.pop("speculator"), "dtype": precision}
    model |= {"prompts": args.prompts or args.corpus / "held_out.jsonl"}
    others = [f"{name}={path}" for name, path in (drafters | {"draft_model": draft_model}).items()]
    timing = {"drafters": others, "max_new_tokens": args.max_new_tokens, "n_prompts": 8}
    stock = ["generate", "prompt_lookup", "draft_model", "early_exit", "mtp", "dflash"]
    yield command("benchmark_latency.py", **model, **timing, methods=[*stock, "speculator", *drafters, *CACHES],
                  rounds=9, output=folder / "methods")  # fmt: skip
    few = ["generate", "prompt_lookup", "speculator", *drafters]
    yield command("benchmark_latency.py", **model, **timing, methods=few, n_candidates=args.n_candidates,
                  batch_size=args.batch_size, prompt_length=[64, 256], rounds=3,
                  output=folder / "n_candidates")  # fmt: skip
    for name, path in ({"speculator": model["speculator"]} | drafters).items():
        yield command("evaluate_acceptance.py", **model | {"speculator": path}, prompt_length=args.prompt_length,
                      limit=100, temperature=1, top_k=10, max_new_tokens=args.max_new_tokens,
                      output=folder / f"acceptance_{name}")  # fmt: skip
    yield command("tune.py", **model, batch_size=args.batch_size, output=folder / "tuning")


def command(script: str, **flags) -> tuple[str, dict]:
    return script, flags


if __name__ == "__main__":
    command_line.run(main, command_line.GOES_ON)
