"""The whole path on this machine: a base model, a speculator for it in two stages, and what it gains.

python recipes/quickstart.py
python recipes/quickstart.py --base_model meta-llama/Llama-2-13b-chat-hf \\
    --speculator ibm-ai-platform/llama-13b-accelerator
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch


RECIPES = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="outputs/quickstart, or outputs/comparison of given models")
    parser.add_argument("--base_model", help="folder or Hub id; with --speculator, nothing is trained")
    parser.add_argument("--speculator", help="folder or Hub id of a speculator for it")
    args = parser.parse_args()
    if (args.base_model is None) != (args.speculator is None):
        parser.error("give both --base_model and --speculator, or none, to train them here")
    folder = args.output_dir or Path("outputs/comparison" if args.base_model else "outputs/quickstart")
    models = {"base_model": args.base_model, "speculator": args.speculator}

    step("Splitting the standard library's source code", "1 second")
    held_out = folder / "corpus/held_out.jsonl"
    run("quickstart/write_corpus.py", done=held_out, output_dir=folder / "corpus")
    if args.base_model is None:
        models = train(folder)
    step("Comparing with plain generate", "1 minute")
    run("quickstart/compare.py", held_out=held_out, output_dir=folder, **models)


def train(folder: Path) -> dict[str, Path]:
    """Trains what is not on disk yet; an interrupted training goes on from its last checkpoint."""
    models = {name: folder / name for name in ("base_model", "stage1", "speculator")}
    step("Training a tokenizer and a small Llama on it, the base model", "4 minutes")
    run(
        "quickstart/train_base_model.py",
        done=models["base_model"] / "trainer_state.json",  # what the trainings write last
        corpus=folder / "corpus/train.jsonl",
        output_dir=models["base_model"],
    )
    options = {
        "base_model": models["base_model"],
        "data_files": folder / "corpus/train.jsonl",
        "use_cpu": not torch.cuda.is_available(),
    }
    step("Training the speculator, stage 1: on that code", "1 minute")
    run(
        "train_speculator.py",
        done=models["stage1"] / "trainer_state.json",
        config=RECIPES / "quickstart/stage1.yaml",
        output_dir=models["stage1"],
        **options,
    )
    step("Training the speculator, stage 2: on what the base model generates", "2 minutes")
    run(
        "train_speculator.py",
        done=models["speculator"] / "trainer_state.json",
        config=RECIPES / "quickstart/stage2.yaml",
        speculator=models["stage1"],
        output_dir=models["speculator"],
        **options,
    )
    return models


def step(what: str, time: str) -> None:
    print(f"\n\033[1m== {what} (about {time})\033[0m", flush=True)


def run(script: str, done: Path | None = None, **flags) -> None:
    """Runs a script of this folder, unless the file that it writes last is there."""
    if done is not None and done.is_file():
        print(f"{done.parent} is there: using it. Delete that folder to make it anew.")
        return
    arguments = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    print("python", f"recipes/{script}", *arguments, flush=True)
    if subprocess.run([sys.executable, str(RECIPES / script), *arguments]).returncode:
        sys.exit(f"recipes/{script} failed. The same command, run again, goes on from what is on disk.")


if __name__ == "__main__":
    main()
