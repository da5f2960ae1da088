"""What a draft costs beside SmolLM2-135M, and what a draft vocabulary saves: milliseconds, whatever the weights.

python recipes/smollm2-135m/benchmark_draft.py

Random speculators of five heads and the draft vocabularies of N tokens, one row, in turn, medians.
"""

import json
import statistics
from pathlib import Path

import torch

from modeling_speculator.command_line import output_file, parser_of, positive, run, same_command, say_end
from modeling_speculator.drafters import DRAFTERS, config_class_of, turned
from modeling_speculator.loading import load_base_model
from modeling_speculator.measuring.benchmarking import machine, seconds_in_turn, versions, warn_of_other_work
from modeling_speculator.transformers_api import CACHE, cache_of
from modeling_speculator.vocabularies import beside


SIZES = (None, 16384, 8192, 4096)  # of the draft vocabulary; None: all tokens
FORMS = {
    "residual": {"method": "residual"},
    "context": {"method": "context"},
    "published, tied": {"method": "sum_rnn", "inner_dim": 576, "tie_weights": True},
}
CHAIN = {"top_k_tokens_per_head": [1] * 5, "n_candidates": 1, "n_heads": 3}
DIALS = {"chain of 3": CHAIN, "tree of 15": {"top_k_tokens_per_head": [5, 3, 2, 2, 2], "n_tree_nodes": 15}}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--base_model", default="outputs/smollm2-135m/base_model", metavar="FOLDER_OR_ID", help="of any size"
    )
    parser.add_argument("--rounds", type=positive, default=15, metavar="ROUNDS", help="of all ways, in turn")
    parser.add_argument(
        "--output",
        type=output_file,
        default=Path("outputs/smollm2-135m/draft.json"),
        metavar="FILE",
        help="for the figures, as JSON",
    )
    args = parser.parse_args()
    warn_of_other_work()
    model, _ = load_base_model(args.base_model, "float32")
    rows = []
    for name, dials in DIALS.items():
        runs = {"forward of one token": forward(model)} | drafts(model, dials)
        seconds = seconds_in_turn(runs, 2, "a first round") and seconds_in_turn(runs, args.rounds, name)
        rows += [{"draft": name, "way": way, "ms": 1e3 * statistics.median(each)} for way, each in seconds.items()]
        for row in rows[-len(runs) :]:
            print(f"{row['draft']}, {row['way']}: {row['ms']:.1f} ms", flush=True)
    made = {"command": same_command(), "rows": rows, "machine": machine(), "versions": versions()}
    args.output.write_text(json.dumps(made, indent=1) + "\n")
    say_end(args.output)


def forward(model):
    """One step of plain decoding, of a text of 300 tokens."""
    text = torch.randint(model.config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = cache_of(model(text, use_cache=True))

    @torch.no_grad()
    def run_once():
        model(text[:, :1], use_cache=True, **{CACHE: cache})
        cache.crop(-1)

    return run_once


def drafts(model, dials: dict) -> dict:
    """One draft of each form and size."""
    config, runs = model.config, {}
    states, roots = torch.randn(1, 1, config.hidden_size), torch.tensor([[5]])
    for form, options in FORMS.items():
        config_class = config_class_of(options["method"])
        sizes = SIZES if form == "residual" else SIZES[:1]
        speculator = DRAFTERS[config_class](
            config_class(vocab_size=config.vocab_size, emb_dim=config.hidden_size, n_predict=5, **options)
        ).to(model.device)
        for size in sizes:
            if size is not None:
                speculator.config.draft_vocabulary = list(range(size))
            drafter = beside(model, speculator)

            def run_once(drafter=drafter, speculator=speculator):
                with turned(speculator, dials):
                    draft = drafter.generate_tree if "n_tree_nodes" in dials else drafter.generate_candidates
                    draft(states.to(model.device), roots.to(model.device))

            runs[f"{form}, {size or 'all'} tokens"] = run_once
    return runs


if __name__ == "__main__":
    run(main)
