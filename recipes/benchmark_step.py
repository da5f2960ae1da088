"""How fast the decoding loop is, and where the time of a step goes.

python recipes/benchmark_step.py                                        # a random Llama of 36 M parameters, bf16
python recipes/benchmark_step.py --base_model DIR --speculator DIR --prompt "Once upon a time"

Alternates transformers' own `generate`, the loop without candidates, and the loop with the speculator. A random
speculator is never right: its row shows what speculation costs.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import psutil
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.evaluation import generate_greedily, machine, speedup, time_in_turn, versions


COLUMNS = ("tokens_per_second", "speedup", "tokens_per_step", "step_ms", "draft_ms", "verify_ms", "rest_ms")


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    load = psutil.cpu_percent(interval=1.0) / 100 * psutil.cpu_count()
    if load > 0.2:
        print(f"WARNING: {load:.1f} cores are busy with something else. Stop it: its share of the time is not known.")
    model, speculator, prompt = load_models(args)
    n_candidates = speculator.config.n_candidates
    print(f"{type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters, {model.dtype}, {model.device}")

    def loop(n: int, **options):
        speculator.config.n_candidates = n
        return generate_greedily(model, prompt, args.max_new_tokens, assistant_model=speculator, **options)

    rates = time_in_turn(
        {
            "generate": lambda: generate_greedily(model, prompt, args.max_new_tokens).shape[1] - prompt.shape[1],
            "n_candidates = 0": lambda: loop(0).shape[1] - prompt.shape[1],
            f"n_candidates = {n_candidates}": lambda: loop(n_candidates).shape[1] - prompt.shape[1],
        },
        args.rounds,
    )
    print(f"\n{'':18}" + "".join(f"{column:>19}" for column in COLUMNS))
    results = {}
    for name, values in rates.items():
        row = {"tokens_per_second": statistics.median(values), "speedup": speedup(rates, name, "generate")}
        if name != "generate":
            row |= step_times(model, speculator, loop, int(name.split()[-1]))
        results[name] = row
        print(f"{name:18}" + "".join(f"{row[column]:19.2f}" for column in COLUMNS if column in row))
    speculator.config.n_candidates = n_candidates
    print("Milliseconds of a step, the prefill not counted; verify is the forward of the base model.")
    if args.output:
        arguments = {key: str(value) for key, value in vars(args).items()}
        report = {"arguments": arguments, "machine": machine() | {"busy_cores_before": round(load, 2)}}
        report |= {"versions": versions(), "results": results, "rates": rates}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", help="folder or Hub id; a random one by default")
    parser.add_argument("--speculator", help="folder or Hub id; a random one by default")
    parser.add_argument("--prompt", default="def main():")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    return parser.parse_args()


def load_models(args) -> tuple:
    """Base model, speculator and the prompt's tokens."""
    torch.manual_seed(0)
    if args.base_model:
        model = AutoModelForCausalLM.from_pretrained(args.base_model)
        prompt = AutoTokenizer.from_pretrained(args.base_model)(args.prompt, return_tensors="pt").input_ids
    else:
        config = LlamaConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            eos_token_id=None,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        prompt = torch.randint(config.vocab_size, (1, 64))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.speculator:
        speculator = AutoModel.from_pretrained(args.speculator, dtype=model.dtype)
    else:
        config = model.config.get_text_config()
        speculator = MLPSpeculatorPreTrainedModel(
            MLPSpeculatorConfig(vocab_size=config.vocab_size, emb_dim=config.hidden_size)
        ).to(model.dtype)
    return model.eval().to(device), speculator.eval().to(device), prompt.to(device)


def step_times(model, speculator, loop, n_candidates: int) -> dict[str, float]:
    """Milliseconds of a step, the median of five runs each: drafting, verifying, the rest."""
    runs = []
    for _ in range(5):
        spent = Counter()
        with timed(model, "forward", spent), timed(speculator, "generate_candidates", spent):
            start = time.perf_counter()
            statistics_ = loop(n_candidates, return_dict_in_generate=True).speculation
            total = time.perf_counter() - start - spent["first forward"]
        draft, verify = spent["generate_candidates"], spent["forward"]
        scale = 1000 / max(1, statistics_.steps)
        runs.append([scale * t for t in (total, draft, verify, total - draft - verify)])
    medians = [statistics.median(column) for column in zip(*runs, strict=True)]
    return dict(zip(COLUMNS[2:], [statistics_.tokens_per_step, *medians], strict=True))


@contextmanager
def timed(module, name: str, spent: Counter):
    """Adds up the seconds in a method of a module; the first call, of the prefill, is kept apart."""
    original = getattr(module, name)

    @wraps(original)  # `generate` looks at the signature
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = original(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        key = "first forward" if name == "forward" and "first forward" not in spent else name
        spent[key] += time.perf_counter() - start
        return result

    setattr(module, name, wrapper)
    try:
        yield
    finally:
        delattr(module, name)


if __name__ == "__main__":
    main()
