"""Trains speculators in many ways for the same base model, on the same data, at the same cost, and compares them.

python recipes/compare_training.py                                # after `make quickstart`; an hour on two cores
python recipes/compare_training.py --only cross-entropy KL --seeds 0 1
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from modeling_speculator import evaluation
from modeling_speculator.trainers import DataArguments, load_texts, pack
from modeling_speculator.trainers.continuations import ContinuationSampler


RECIPES = Path(__file__).parent
STAGE1_STEPS, STAGE2_STEPS = 160, 80
STAGE2_COST = 3.2  # of a step of stage 2, generation included, in steps of stage 1 (quickstart's recipes, one thread)
BOTH = STAGE1_STEPS + STAGE2_COST * STAGE2_STEPS

# What differs from the published recipe: flags of train_speculator.py for a new speculator, and for both stages.
VARIANTS = {
    "cross-entropy (published)": ({}, {}),
    "KL": ({}, {"loss": ["forward_kl"]}),
    "total variation": ({}, {"loss": ["total_variation"]}),
    "LK: -log acceptance": ({}, {"loss": ["negative_log_acceptance"]}),
    "LK: KL and TV": ({}, {"loss": ["lk_hybrid"]}),
    "cross-entropy and LK": ({}, {"loss": ["cross_entropy", "negative_log_acceptance"], "loss_weights": [0.5, 0.5]}),
    "head weights 0.8^i": ({}, {"head_weights": [1.0, 0.8, 0.64]}),
    "unrolled, 30 %": ({}, {"unrolled_share": [0.3]}),
    "noise, 10 %": ({}, {"hidden_state_noise": [0.1]}),
    "scaled input": ({"scale_input": ["true"]}, {}),
    "tied heads": ({"tie_weights": ["true"]}, {}),
    "tied to the base model": ({"tie_to_base_model": ["true"]}, {}),
    "gated cell": ({"method": ["sum_lstm"], "tie_weights": ["true"]}, {}),
    "stage 1 only": ({}, {"steps": (round(BOTH), 0)}),
    "stage 2 only": ({}, {"steps": (0, round(BOTH / STAGE2_COST))}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", type=Path, default=Path("outputs/quickstart/base_model"))
    parser.add_argument("--corpus", type=Path, default=Path("outputs/quickstart/corpus"), help="train, held_out.jsonl")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/training_comparison"))
    parser.add_argument("--results", type=Path, default=RECIPES / "results/training_comparison.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), help="variants")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side, one thread each")
    args = parser.parse_args()

    # Stage 2's texts are written once, for the variant that needs most of them.
    train(args, "stage 2 only", args.seeds[0])
    texts = held_out_texts(args)
    runs = [(variant, seed) for seed in args.seeds for variant in args.only]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = pool.map(lambda run: train(args, *run), runs)
        rows = [
            {"variant": variant, "seed": seed} | measure(folder, texts)
            for (variant, seed), folder in zip(runs, folders, strict=True)
        ]
    report = {
        "command": " ".join(["python", *sys.argv]),
        "steps": {"stage1": STAGE1_STEPS, "stage2": STAGE2_STEPS},
        "rows": rows,
        "versions": evaluation.versions(),
        "machine": evaluation.machine(),
    }
    args.results.write_text(json.dumps(report, indent=1) + "\n")
    show(rows)


def train(args, variant: str, seed: int) -> Path:
    """The folder of a trained speculator; one that is there is not trained again."""
    new, options = VARIANTS[variant]
    stage1_steps, stage2_steps = options.get("steps", (STAGE1_STEPS, STAGE2_STEPS))
    folder = args.output_dir / f"{variant.replace(' ', '_').replace(':', '')}-{seed}"
    common = {"seed": [seed], "base_model": [args.base_model], "data_files": [args.corpus / "train.jsonl"]}
    common |= {"validation_fraction": [0], "save_strategy": ["no"], "disable_tqdm": ["true"]}
    common |= {key: value for key, value in options.items() if key != "steps"}
    if stage1_steps:
        steps = {"max_steps": [stage1_steps], "warmup_steps": [stage1_steps // 8], "output_dir": [folder / "stage1"]}
        run("stage1", common | new | steps)
    if stage2_steps:
        start = (
            {"speculator": [folder / "stage1"]} if stage1_steps else {"speculator": ["null"], "inner_dim": [256]} | new
        )
        steps = {"max_steps": [stage2_steps], "warmup_steps": [stage2_steps // 10], "output_dir": [folder / "stage2"]}
        # The same texts for all, whatever their seed; its order is the seed's.
        run(
            "stage2",
            common | start | steps | {"generated_dataset": [args.output_dir / "generated"], "generation_seed": [0]},
        )
    return folder / ("stage2" if stage2_steps else "stage1")


def run(stage: str, flags: dict[str, list]) -> None:
    (folder,) = flags["output_dir"]
    if (folder / "trainer_state.json").is_file():  # what a training writes last
        return
    command = [
        sys.executable,
        str(RECIPES / "train_speculator.py"),
        "--config",
        str(RECIPES / f"quickstart/{stage}.yaml"),
    ]
    for key, values in flags.items():
        command += [f"--{key}", *map(str, values)]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: see {folder}/log.txt. The same command, run again, goes on.")


def held_out_texts(args) -> dict:
    """What the base model writes after 200 held-out prompts, greedily where that does not loop, and sampled."""
    base_model = AutoModelForCausalLM.from_pretrained(args.base_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.base_model)
    texts = load_texts(DataArguments(data_files=[str(args.corpus / "held_out.jsonl")]))
    rows = pack(texts, tokenizer, 64, separate_documents=False)
    prompts = torch.tensor([rows[at * len(rows) // 200]["input_ids"] for at in range(200)])
    written = {
        "greedy": ContinuationSampler(base_model, 64, temperature=0.0),
        "sampled": ContinuationSampler(base_model, 64),
    }
    written = {name: sampler(prompts, seed=0) for name, sampler in written.items()}
    varied = [evaluation.distinct_ngrams(tokens, 4) > 0.5 for tokens in written["greedy"].tokens.tolist()]
    written["greedy"] = type(written["greedy"])(*(part[torch.tensor(varied)] for part in written["greedy"]))
    return written


def measure(folder: Path, texts: dict) -> dict:
    speculator = AutoModel.from_pretrained(folder)
    row = {
        "parameters": speculator.num_parameters(),
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
    }
    for name, written in texts.items():
        accepted = evaluation.accepted_drafts(speculator, written.states, written.labels)
        steps, tokens = evaluation.simulate_steps(accepted, (written.labels != -100).sum(-1))
        row[name] = tokens / steps
    return row


def show(rows: list[dict]) -> None:
    """A table of means over the seeds; a difference within the spread of the seeds is none."""
    print("| | tokens per step, greedy | | sampled | | parameters, M |\n|---|---|---|---|---|---|")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        cells = [variant]
        for name in ("greedy", "sampled"):
            values = [row[name] for row in mine]
            cells += [f"{statistics.mean(values):.3f}", f"{min(values):.3f} to {max(values):.3f}"]
        print("| " + " | ".join([*cells, f"{mine[0]['parameters'] / 1e6:.2f}"]) + " |")


if __name__ == "__main__":
    main()
