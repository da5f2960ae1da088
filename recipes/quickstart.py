"""The whole path on this machine: a base model, a speculator for it in two stages, and what it gains.

python recipes/quickstart.py
python recipes/quickstart.py --base_model meta-llama/Llama-2-13b-chat-hf \\
    --speculator ibm-ai-platform/llama-13b-accelerator

Within twelve minutes on two CPU cores: what is trained is as large as the machine is fast.
"""

import json
import sys
from pathlib import Path

import torch

from modeling_speculator import command_line
from modeling_speculator.precision import PRECISIONS


RECIPES = Path(__file__).parent
# Of training steps, at most; on fast machines they are done in less. Starts, tokenizing, measuring, evaluating and the
# comparison take the rest of the twelve.
MINUTES = {"base_model": 3.4, "stage1": 0.9, "stage2": 2.3}


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument(
        "--output_dir",
        type=command_line.output_folder,
        metavar="FOLDER",
        help="for all that is made (default: outputs/quickstart, or outputs/comparison of given models)",
    )
    given = {"metavar": "FOLDER_OR_ID"}
    parser.add_argument("--base_model", **given, help="with --speculator, nothing is trained (default: train one)")
    parser.add_argument("--speculator", **given, help="a speculator for it (default: train one)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fast", help="of the trainings, or of given models; fast: measured"
    )
    args = parser.parse_args()
    if (args.base_model is None) != (args.speculator is None):
        parser.error("give both --base_model and --speculator, or none, to train them here")
    folder = args.output_dir or Path("outputs/comparison" if args.base_model else "outputs/quickstart")
    models = {"base_model": args.base_model, "speculator": args.speculator, "precision": args.precision}

    step("Splitting the standard library's source code")
    held_out = folder / "corpus/held_out.jsonl"
    run("quickstart/write_corpus.py", done=held_out, output_dir=folder / "corpus")
    if args.base_model is None:
        models = train(folder, args.precision)
    step("Comparing with plain generate")
    run("quickstart/compare.py", held_out=held_out, output_dir=folder, **models)
    both = {"base_model": models["base_model"], "speculator": models["speculator"]}
    measure = {"prompts": held_out, "batch_size": [1, 2, 4], "output": folder / "tuning"}
    then = {
        "try it": command_line.command_of("generate.py", **both, prompt="def quicksort(numbers):", compare=[]),
        "find out whether it helps at your load": command_line.command_of("tune.py", **both, **measure),
    }
    command_line.say_end(folder, then=then)


def train(folder: Path, precision: str) -> dict[str, Path | str]:
    """Trains what is not on disk yet; an interrupted training goes on from its last checkpoint."""
    models = {name: folder / name for name in ("base_model", "stage1", "speculator")}
    corpus, last = folder / "corpus/train.jsonl", "trainer_state.json"  # what the trainings write last
    step("Training a tokenizer and a small Llama on it, the base model")
    run(
        "quickstart/train_base_model.py",
        done=models["base_model"] / last,
        corpus=corpus,
        output_dir=models["base_model"],
        minutes=MINUTES["base_model"],
        precision=precision,
    )
    options = {"base_model": models["base_model"], "precision": precision}
    step("Measuring what a step of the speculator's training takes")
    run(
        "quickstart/size_stages.py",
        done=folder / "stages.json",
        corpus=corpus,
        output=folder / "stages.json",
        minutes=[MINUTES["stage1"], MINUTES["stage2"]],
        **options,
    )
    steps = json.loads((folder / "stages.json").read_text())
    options |= {"data_files": corpus, "use_cpu": not torch.cuda.is_available()}
    step("Training the speculator, stage 1: on that code")
    run(
        "train_speculator.py",
        done=models["stage1"] / last,
        config=RECIPES / "quickstart/stage1.yaml",
        output_dir=models["stage1"],
        max_steps=steps["stage1"],
        **options,
    )
    step("Training the speculator, stage 2: on what the base model generates")
    run(
        "train_speculator.py",
        done=models["speculator"] / last,
        config=RECIPES / "quickstart/stage2.yaml",
        speculator=models["stage1"],
        output_dir=models["speculator"],
        max_steps=steps["stage2"],
        **options,
    )
    return models | {"precision": "float32"}  # in which outputs are identical, bit for bit


def step(what: str) -> None:
    print(f"\n\033[1m== {what}\033[0m", flush=True)


def run(script: str, done: Path | None = None, **flags) -> None:
    """Runs a script of this folder, unless the file that it writes last is there."""
    if done is not None and done.is_file():
        print(f"{done} is there: using it. Delete {done.parent} to make it anew.")
        return
    print(command_line.command_of(script, **flags), flush=True)
    if command_line.run_script(RECIPES / script, *command_line.flags_of(**flags)):
        sys.exit(f"recipes/{script} failed. The same command, run again, goes on from what is on disk.")


if __name__ == "__main__":
    command_line.run(main, command_line.GOES_ON)
