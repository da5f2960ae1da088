"""Trains speculators in many ways for one base model, on the same data, and compares them on held-out prompts.

python recipes/sweep.py --variants recipes/sweeps/objectives.yaml     # after `make quickstart`
python recipes/sweep.py --variants recipes/sweeps/heads.yaml --only "1 head" "7 heads" --seeds 0 1

Writes the raw figures (JSON), from which plot_sweep.py makes a table and plots.
"""

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml
from tqdm import tqdm
from transformers import AutoModel, PreTrainedModel

from modeling_speculator import command_line
from modeling_speculator.command_line import flags_of, last_lines, positive, run_script, say_end
from modeling_speculator.loading import load_base_model
from modeling_speculator.measuring import benchmarking, evaluation
from modeling_speculator.model_cards.provenance_file import read_provenance
from modeling_speculator.precision import PRECISIONS, keep_precision
from modeling_speculator.stream_adapters import FOLDER as ADAPTER
from modeling_speculator.trainers import DataArguments, load_texts, pack
from modeling_speculator.trainers.continuations import ContinuationSampler


RECIPES = Path(__file__).parent
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 200, 64, 64
LAST = "trainer_state.json"  # what a training writes when it is done


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument("--variants", type=Path, required=True, metavar="FILE", help="YAML: steps, seeds, variants")
    here = Path("outputs/quickstart")
    parser.add_argument(
        "--base_model", type=Path, default=here / "base_model", metavar="FOLDER", help="to train speculators for"
    )
    parser.add_argument(
        "--corpus", type=Path, default=here / "corpus", metavar="FOLDER", help="with train, held_out.jsonl"
    )
    parser.add_argument(
        "--inner_dim", type=positive, metavar="WIDTH", help="where a variant has none (default: sweeps/stage1.yaml's)"
    )
    parser.add_argument(
        "--output_dir", type=Path, metavar="FOLDER", help="of the speculators (default: outputs/sweeps/NAME)"
    )
    parser.add_argument(
        "--results", type=command_line.output_file, metavar="FILE", help="JSON (default: results.json there)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="NUMBER", help="of the trainings (default: the YAML's)"
    )
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="of the YAML's (default: all)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fast", help="of the trainings")
    parser.add_argument("--jobs", type=positive, default=2, metavar="TRAININGS", help="side by side, one thread each")
    args = parser.parse_args()
    args.sweep = yaml.safe_load(args.variants.read_text())
    if not {"steps", "seeds", "variants"} <= set(args.sweep or ()):
        parser.error(f"{args.variants} needs `steps`, `seeds` and `variants`, as recipes/sweeps/heads.yaml has")
    args.output_dir = args.output_dir or Path("outputs/sweeps") / args.variants.stem
    args.results = args.results or args.output_dir / "results.json"
    command_line.check_writable(args.output_dir)
    names = args.only or list(args.sweep["variants"])
    if unknown := set(names) - args.sweep["variants"].keys():
        parser.error(f"{args.variants} has no {sorted(unknown)}, only {list(args.sweep['variants'])}")
    args.precision = keep_precision(args.output_dir, args.precision)
    print(f"Each training's output is in the log.txt beside it, below {args.output_dir}.", flush=True)
    base_model, prompts = held_out_prompts(args)
    texts = written_after(prompts, base_model)
    runs = [(name, seed) for seed in args.seeds or args.sweep["seeds"] for name in names]
    # The texts of stage 2 are written once, by the training that needs most of them.
    train(args, *max(runs, key=lambda run: steps_of(args, run[0])[1]))
    with ThreadPoolExecutor(args.jobs) as pool:
        trained = {run: pool.submit(train, args, *run) for run in runs}
        try:
            rows = [
                {"variant": run[0], "seed": run[1]} | measure(trained[run].result(), base_model, prompts, texts)
                for run in tqdm(runs, desc="speculators", unit="speculator")
            ]
        finally:  # where one fails, or is interrupted, those that wait are not begun
            pool.shutdown(cancel_futures=True)
    report = {"command": " ".join(["python", *sys.argv]), "sweep": args.sweep, "rows": rows}
    report |= {"base_model": str(args.base_model)}
    report |= {"versions": benchmarking.versions(), "machine": benchmarking.machine()}
    args.results.write_text(json.dumps(report, indent=1) + "\n")
    say_end(args.results)
    sys.exit(run_script(RECIPES / "plot_sweep.py", str(args.results)))


def steps_of(args, name: str) -> list[int]:
    return args.sweep["variants"][name].get("steps", args.sweep["steps"])


def train(args, name: str, seed: int) -> Path:
    """The folder of a trained speculator; what is there is not trained again."""
    variant, stages = args.sweep["variants"][name], dict(enumerate(steps_of(args, name), start=1))
    options = {key: value for key, value in variant.items() if key not in ("new", "steps", "stage1", "stage2")}
    options |= {"data_files": args.corpus / "train.jsonl", "validation_fraction": 0, "seed": seed}
    options |= {"base_model": args.base_model, "precision": args.precision}
    options |= {"save_strategy": "no", "disable_tqdm": True}
    folder = args.output_dir / f"{name}-{seed}".replace(" ", "_").replace(":", "")
    speculator = None
    for stage, steps in stages.items():
        if steps:
            flags = options | variant.get(f"stage{stage}", {})
            flags |= {"output_dir": folder / f"stage{stage}", "max_steps": steps}
            flags |= {"warmup_steps": steps // (8 if stage == 1 else 10)}
            width = {"inner_dim": args.inner_dim} if args.inner_dim else {}
            flags |= {"speculator": speculator or "null"} | ({} if speculator else width | variant.get("new", {}))
            if stage == 2:  # the same texts for all; their order is the seed's
                flags |= {"generated_dataset": args.output_dir / "generated", "generation_seed": 0}
            run(stage, flags)
            speculator = folder / f"stage{stage}"
    return folder


def run(stage: int, flags: dict) -> None:
    folder = flags["output_dir"]
    flags = {key: [*map(str, value if isinstance(value, list) else [value])] for key, value in flags.items()}
    made_with = folder / "flags.json"
    if (folder / LAST).is_file():
        if json.loads(made_with.read_text()) != flags:
            sys.exit(f"{folder} was trained with other flags ({made_with}): delete it, or take another --output_dir.")
        return
    shutil.rmtree(folder, ignore_errors=True)
    for other in folder.parents[1].glob("*/stage*/flags.json"):  # variants may differ in stage 2 only
        if not (other.parent / LAST).is_file():  # perhaps its flags are being written
            continue
        if json.loads(other.read_text()) | {"output_dir": flags["output_dir"]} == flags:
            copy = shutil.copytree(other.parent, folder.with_name("unfinished"), dirs_exist_ok=True)
            (copy / made_with.name).write_text(json.dumps(flags))
            copy.rename(folder)
            return
    folder.mkdir(parents=True)
    made_with.write_text(json.dumps(flags))
    command = ["--config", str(RECIPES / f"sweeps/stage{stage}.yaml")]
    command += flags_of(**flags)
    log = folder / "log.txt"
    tqdm.write(f"Training, with its output in {log}")
    with open(log, "w") as file:
        options = {"stdout": file, "stderr": file, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
        status = run_script(RECIPES / "train_speculator.py", *command, **options)
    if status:
        sys.exit(
            f"{last_lines(log)}\n{folder} failed; these are the last lines of {log}. Run again, the sweep goes on."
        )


def held_out_prompts(args) -> tuple[PreTrainedModel, torch.Tensor]:
    """The base model, and held-out prompts: (PROMPTS, PROMPT_LENGTH) token ids."""
    base_model, tokenizer = load_base_model(str(args.base_model), "float32", "cpu")
    texts = load_texts(DataArguments(data_files=[str(args.corpus / "held_out.jsonl")]))
    rows = pack(texts, tokenizer, PROMPT_LENGTH, separate_documents=False)
    return base_model, torch.tensor([rows[at * len(rows) // PROMPTS]["input_ids"] for at in range(PROMPTS)])


def written_after(prompts: torch.Tensor, base_model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Prompts with what a model writes after them, greedily where that does not loop, and sampled: (texts,
    PROMPT_LENGTH + NEW_TOKENS) token ids."""
    greedy, sampled = (
        ContinuationSampler(base_model, NEW_TOKENS, temperature).write(prompts, seed=0)
        for temperature in tqdm((0.0, 1.0), desc="texts to measure on", unit="text a prompt", leave=False)
    )
    labels = ContinuationSampler(base_model, NEW_TOKENS).labels(greedy[:, PROMPT_LENGTH:])
    varied = torch.tensor([not evaluation.loops([t for t in row if t != -100]) for row in labels.tolist()])
    return {"greedy": greedy[varied], "sampled": sampled}


def measure(folder: Path, base_model: PreTrainedModel, prompts: torch.Tensor, texts: dict[str, torch.Tensor]) -> dict:
    """Tokens per step of a trained speculator, its size, and the losses of its trainings: {stage: [[step, loss]]}."""
    stages = sorted(folder.glob("stage*"))
    speculator = AutoModel.from_pretrained(stages[-1])
    row = {"n_predict": speculator.config.n_predict, "parameters": speculator.num_parameters(), "losses": {}}
    if getattr(speculator.config, "shared_adapter", False):  # on what the adapted model writes
        base_model, _ = load_base_model(str(stages[-1] / ADAPTER), "float32", "cpu")
        texts = written_after(prompts, base_model)
    drafter, cell = speculator.beside(base_model), speculator.speculator
    for name, whole in texts.items():
        layers = cell.feature_layers if cell.reads_text else None
        written = ContinuationSampler(base_model, NEW_TOKENS).read(whole, feature_layers=layers)
        accepted = evaluation.accepted_drafts(drafter, written.starts(drafter), written.labels)
        steps, tokens = evaluation.simulate_steps(accepted, (written.labels != -100).sum(-1))
        row[name] = tokens / steps
    row["training_seconds"] = sum(read_provenance(stage)["seconds"] for stage in stages)
    for stage in stages:
        history = json.loads((stage / "trainer_state.json").read_text())["log_history"]
        row["losses"][stage.name] = [[log["step"], log["loss"]] for log in history if "loss" in log]
    return row


if __name__ == "__main__":
    command_line.run(main, command_line.GOES_ON)
