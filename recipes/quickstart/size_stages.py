"""How many steps of the speculator's trainings fit into some minutes here: some of each are measured.

python recipes/quickstart/size_stages.py --base_model base_model --corpus corpus/train.jsonl --minutes 1 2.5 \\
    --output stages.json
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_speculator.command_line import parser_of, positive_number, run, say_end
from modeling_speculator.precision import PRECISIONS
from modeling_speculator.trainers import (
    DistillationTrainer,
    SpeculatorTrainer,
    load_or_create_speculator,
    load_rows,
    parse_recipe,
)
from modeling_speculator.trainers.pace import seconds_per_step, spoken, steps_within


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--base_model", required=True, metavar="FOLDER", help="to train speculators for")
    parser.add_argument("--corpus", required=True, metavar="FILE", help="jsonl with `text`, to train on")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON: {stage: steps}")
    parser.add_argument(
        "--minutes", type=positive_number, nargs=2, required=True, metavar="MINUTES", help="of stage 1 and of stage 2"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fast", help="fast: whichever is, on this machine")
    args = parser.parse_args()
    steps = {}
    for stage, minutes in enumerate(args.minutes, start=1):
        print(f"Measuring a step of stage {stage}, for some seconds", flush=True)
        seconds = measure(stage, args)
        most = parse_recipe(["--config", recipe_of(stage), "--precision", "float32"])[2].max_steps
        fitting = steps[f"stage{stage}"] = steps_within(minutes, seconds, most)
        print(f"Stage {stage}: a step takes {seconds:.2f} seconds here, {fitting} steps {spoken(fitting * seconds)}.")
    args.output.write_text(json.dumps(steps) + "\n")
    say_end(args.output)


def measure(stage: int, args) -> float:
    """Seconds of a step, of a new speculator's: as much work as any other's."""
    with TemporaryDirectory() as folder:
        flags = ["--base_model", args.base_model, "--data_files", args.corpus, "--output_dir", folder]
        flags += ["--precision", args.precision, "--use_cpu", str(not torch.cuda.is_available())]
        flags += ["--speculator", "null", "--max_steps", "8", "--save_strategy", "no", "--disable_tqdm", "true"]
        new, *_ = parse_recipe(["--config", recipe_of(1), *flags])
        model, data, training = parse_recipe(["--config", recipe_of(stage), *flags])
        base_model = AutoModelForCausalLM.from_pretrained(args.base_model, dtype=model.base_model_dtype)
        tokenizer = AutoTokenizer.from_pretrained(args.base_model)
        rows, _ = load_rows(data, tokenizer, stage, training.seed)
        trainer = (SpeculatorTrainer if stage == 1 else DistillationTrainer)(
            model=load_or_create_speculator(new, base_model),
            base_model=base_model,
            args=training,
            train_dataset=rows,
            generation_length=data.generation_length,
        )
        return seconds_per_step(trainer)


def recipe_of(stage: int) -> str:
    return str(Path(__file__).parent / f"stage{stage}.yaml")


if __name__ == "__main__":
    run(main)
