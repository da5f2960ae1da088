"""Trains speculators of several forms on the same texts, in as many steps: what measure_forms.py then compares.

python recipes/smollm2-135m/train_forms.py --held_out_prompts spec_bench.jsonl

The first writes what all are trained on. A second run goes on with what is not finished.
"""

import sys
from pathlib import Path

from modeling_speculator.command_line import GOES_ON, flags_of, output_folder, parser_of, run, run_script, say_end


HERE = Path(__file__).parent
NO_FEATURES = {"feature_layers": "null"}
OWN_VOCABULARY = NO_FEATURES | {"inner_dim": 576}
FORMS = {
    "fused": {},
    "fused, tied": {"tie_weights": True},
    "fused, 3 heads": {"n_predict": 3, "top_k_tokens_per_head": [5, 3, 2], "head_weights": [1.0, 0.8, 0.64]},
    "context": NO_FEATURES,
    "residual": NO_FEATURES | {"method": "residual"},
    "published, tied": OWN_VOCABULARY | {"method": "sum_rnn", "tie_weights": True},
    "published": OWN_VOCABULARY | {"method": "sum_rnn"},
    "gated": OWN_VOCABULARY | {"method": "sum_lstm", "tie_weights": True},
    "medusa": NO_FEATURES | {"method": "medusa"},
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--output_dir",
        type=output_folder,
        default=Path("outputs/smollm2-135m/forms"),
        metavar="FOLDER",
        help="for a speculator of each form",
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM", help="to train")
    parser.add_argument("--seed", type=int, default=0, metavar="NUMBER", help="of the trainings, not of the texts")
    parser.add_argument(
        "--held_out_prompts", nargs="+", metavar="FILE", help="to measure on, and not to train on (default: none)"
    )
    args, more = parser.parse_known_args()  # what else is given goes to each training
    if args.held_out_prompts:
        more = ["--held_out_prompts", *args.held_out_prompts, *more]
    for form in args.forms:
        folder = args.output_dir / f"{form.replace(', ', '_').replace(' ', '_')}-{args.seed}"
        flags = FORMS[form] | {"output_dir": folder, "seed": args.seed, "generation_seed": 0}
        print(f"== {form}: {folder}", flush=True)
        recipe = ["--config", str(HERE / "context.yaml"), *flags_of(**flags), *more]
        if status := run_script(HERE.with_name("train_speculator.py"), *recipe):
            sys.exit(status)
    say_end(args.output_dir)


if __name__ == "__main__":
    run(main, GOES_ON)
