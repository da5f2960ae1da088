"""How fast the decoding loop is, against what users would run instead, and where the time of a step goes.

python recipes/benchmark_step.py                                        # a random Llama of 36 M parameters
python recipes/benchmark_step.py --base_model DIR --speculator DIR --prompt "Once upon a time" --compile

Every row continues the same prompt; the runs alternate. A random speculator is never right: its rows show what
speculation costs, not what it gains. --compile adds the static cache, each of whose rows compiles for a while first.
"""

import argparse
import json
import statistics
import time
from functools import partial

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.candidate_tree import max_nodes
from modeling_speculator.command_line import output_file, parser_of, positive, run, say_end
from modeling_speculator.loading import load_base_model, load_speculator
from modeling_speculator.measuring.benchmarking import (
    machine,
    speedup,
    step_times,
    time_in_turn,
    versions,
    warn_of_other_work,
)
from modeling_speculator.measuring.evaluation import generate_greedily
from modeling_speculator.precision import fast_dtype
from modeling_speculator.transformers_api import compile_on_any_device


COLUMNS = {
    "tokens_per_second": "tokens/s",
    "speedup": "x generate",
    "over_static": "x static",
    "first_call_seconds": "first call s",
    "tokens_per_step": "tokens/step",
    "step_ms": "step ms",
    "draft_ms": "draft ms",
    "verify_ms": "verify ms",
    "overhead": "overhead",
}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    busy = warn_of_other_work()
    model, speculator, prompt = load_models(args)
    print(f"{type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters, {model.dtype}, {model.device}")

    def run(dials: dict | None, **options):
        """One generation: plain, or with the speculator's dials set so."""
        for dial, value in (dials or {}).items():
            setattr(speculator.config, dial, value)
        assistant = {} if dials is None else {"assistant_model": speculator}
        return generate_greedily(model, prompt, args.max_new_tokens, **assistant, **options)

    def n_tokens(dials: dict | None, options: dict) -> int:
        return run(dials, **options).shape[1] - prompt.shape[1]

    def speculation(dials: dict, options: dict):
        return run(dials, **options, return_dict_in_generate=True).speculation

    rows = methods(speculator.config, args.compile)
    count = {name: partial(n_tokens, *row) for name, row in rows.items()}
    first = {}
    for name, generate in tqdm(count.items(), desc="first calls", leave=False):
        start = time.perf_counter()
        generate()
        first[name] = time.perf_counter() - start
    rates = time_in_turn(count, args.rounds)
    print(f"\n{'':28}" + "".join(f"{column:>13}" for column in COLUMNS.values()))
    results = {}
    for name, (dials, options) in rows.items():
        row = {"tokens_per_second": statistics.median(rates[name]), "speedup": speedup(rates, name, "generate")}
        if "static" in name:
            row |= {"over_static": speedup(rates, name, "static"), "first_call_seconds": first[name]}
        if dials is not None:
            row["tokens_per_step"] = speculation(dials, options).tokens_per_step
            if "static" not in name:
                row |= step_times(model, speculator, partial(speculation, dials, options))
        results[name] = row
        print(f"{name:28}" + "".join(f"{row[c]:13.2f}" if c in row else " " * 13 for c in COLUMNS))
    print("The prefill is not in a step's milliseconds; overhead is a step over its draft and its verifying forward.")
    if args.output:
        arguments = {key: str(value) for key, value in vars(args).items()}
        report = {"arguments": arguments, "machine": machine() | {"busy_cores_before": round(busy, 2)}}
        report |= {"versions": versions(), "results": results, "rates": rates}
        args.output.write_text(json.dumps(report, indent=2) + "\n")
        say_end(args.output)


def methods(config, with_static: bool) -> dict[str, tuple[dict | None, dict]]:
    """{name: (the speculator's dials, None without it; options of generate)}."""
    published = {"n_candidates": config.n_candidates, "n_tree_nodes": None}
    best_nodes = published | {"n_tree_nodes": max_nodes(config) - 1}
    rows = {
        "generate": (None, {}),
        "prompt lookup": (None, {"prompt_lookup_num_tokens": 5}),
        "n_candidates = 0": (published | {"n_candidates": 0}, {}),
        f"n_candidates = {config.n_candidates}": (published, {}),
        f"n_tree_nodes = {best_nodes['n_tree_nodes']}": (best_nodes, {}),
    }
    if with_static:
        static = {"cache_implementation": "static", "compile_config": compile_on_any_device()}
        rows["static"] = (None, static)
        rows |= {f"static, {name}": (dials, static) for name, (dials, _) in rows.items() if dials is not None}
    return rows


def parse_args() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--base_model", metavar="FOLDER_OR_ID", help="the model to speed up (default: a random one)")
    parser.add_argument("--speculator", metavar="FOLDER_OR_ID", help="a speculator for it (default: a random one)")
    parser.add_argument("--prompt", default="def main():", metavar="TEXT", help="to continue, with a --base_model")
    parser.add_argument("--max_new_tokens", type=positive, default=200, metavar="TOKENS", help="after the prompt")
    parser.add_argument("--rounds", type=positive, default=9, metavar="ROUNDS", help="whose median counts")
    parser.add_argument("--threads", type=positive, default=1, metavar="THREADS", help="of a CPU")
    parser.add_argument("--compile", action="store_true", help="measure the static cache, too")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="JSON, for the results (default: none)")
    return parser.parse_args()


def load_models(args) -> tuple:
    """Base model, speculator and the prompt's tokens."""
    torch.manual_seed(0)
    if args.base_model:
        model, tokenizer = load_base_model(args.base_model)
        prompt = tokenizer(args.prompt, return_tensors="pt").input_ids
    else:
        sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536}
        config = LlamaConfig(**sizes, num_hidden_layers=8, num_attention_heads=8, eos_token_id=None)
        model = AutoModelForCausalLM.from_config(config, dtype=fast_dtype())
        prompt = torch.randint(config.vocab_size, (1, 64))
        model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    if args.speculator:
        speculator = load_speculator(args.speculator, model)
    else:
        config = model.config.get_text_config()
        config = MLPSpeculatorConfig(vocab_size=config.vocab_size, emb_dim=config.hidden_size)
        speculator = MLPSpeculatorPreTrainedModel(config).eval().to(model.device, model.dtype)
    return model, speculator, prompt.to(model.device)


if __name__ == "__main__":
    run(main)
