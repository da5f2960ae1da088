"""What a decoding step costs on a GPU, against the floor that the memory's bandwidth sets: `make bench-gpu`.

python recipes/benchmark_gpu.py --output recipes/results/gpu.json
python recipes/benchmark_gpu.py --targets llama2-7b --batch_sizes 1 --contexts 64

Models of the true shapes with random weights in bf16, so that every step emits one token: what a step takes follows
from two lengths of text. The floor: the bytes of weights, keys and values that a step reads, over the bandwidth of a
copy in the same run. break_even: the tokens per step from which on speculation gains. Milliseconds throughout, but for
first_call_s, which holds the compilation. What is measured is printed and written at once, method by method.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GPTBigCodeConfig, LlamaConfig

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.command_line import output_file, parser_of, positive, run, say_end
from modeling_speculator.measuring.benchmarking import copy_bandwidth, machine, synchronize, versions


LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
LLAMA2_13B = LLAMA2 | {"hidden_size": 5120, "intermediate_size": 13824}
GRANITE = {"vocab_size": 49152, "n_positions": 8192, "n_embd": 6144, "n_layer": 52, "n_head": 48, "n_inner": 24576}
# Base models, and the number of heads of their published speculators.
TARGETS = {
    "llama2-7b": (LlamaConfig(**LLAMA2), 3),
    "llama2-13b": (LlamaConfig(**LLAMA2_13B, num_hidden_layers=40, num_attention_heads=40), 3),
    "granite-20b": (GPTBigCodeConfig(**GRANITE, multi_query=True), 4),
    "tiny": (LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2), 3),
}
NODES = 16  # of a tree, the root included
# Of the compiled steps twice, with and without the guards that torch looks at before each. That of transformers takes
# longest to compile, so that it comes last.
EAGER = ("eager_generate", "eager_loop", "eager_speculative")
METHODS = (*EAGER, "loop", "speculative", "unguarded_loop", "unguarded_speculative", "compiled_generate")


def main() -> None:
    args = parse_args()
    copied = copy_bandwidth(args.device)
    report = {"machine": machine(), "versions": versions(), "copy_gb_per_second": copied / 1e9, "rows": []}
    print(json.dumps({key: report[key] for key in ("machine", "copy_gb_per_second")}), flush=True)
    for target in args.targets:
        model, speculator = build(target, args.device)
        for batch, context in tqdm(list(product(args.batch_sizes, args.contexts)), desc=target, unit="cell"):
            row = {"target": target, "batch_size": batch, "context": context}
            report["rows"].append(row)
            try:
                for new in measure(model, speculator, batch, context, copied, args):
                    row |= new
                    tqdm.write(json.dumps(new))
                    write(report, args.output)
            except torch.OutOfMemoryError:
                row["skipped"] = "out of memory"
            tqdm.write(json.dumps(row))
        report.setdefault("kernels", {})[target] = profile(model, speculator, args)
        write(report, args.output)
        del model, speculator
        torch.compiler.reset()
    if args.output:
        say_end(args.output)


def write(report: dict, output: Path | None) -> None:
    if output:
        output.write_text(json.dumps(report, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = parser_of(__doc__)
    sizes = [name for name in TARGETS if name != "tiny"]
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=sizes, help="shapes of models")
    parser.add_argument(
        "--batch_sizes", nargs="+", type=positive, default=[1, 4, 16, 64], metavar="PROMPTS", help="continued at once"
    )
    parser.add_argument(
        "--contexts", nargs="+", type=positive, default=[64, 512, 2048], metavar="TOKENS", help="of a prompt"
    )
    parser.add_argument("--rounds", type=positive, default=3, metavar="ROUNDS", help="whose median counts")
    parser.add_argument("--steps", type=positive, default=32, metavar="STEPS", help="that are timed in a round")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="that are measured")
    parser.add_argument("--device", default="cuda", metavar="DEVICE", help="cuda or cpu")
    parser.add_argument(
        "--trace",
        type=output_file,
        metavar="FILE",
        help="*.json.gz, for what a profiler sees (default: none)",
    )
    parser.add_argument("--output", type=output_file, metavar="FILE", help="JSON, for the results (default: none)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; `--device cpu --targets tiny` tries the script")
    return args


def build(target: str, device: str) -> tuple:
    """A base model and a speculator of the true shapes, in bf16."""
    config, n_predict = TARGETS[target]
    inner_dim = min(4096, config.hidden_size)
    sizes = {"vocab_size": config.vocab_size, "emb_dim": config.hidden_size, "inner_dim": inner_dim}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        speculator = MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(**sizes, n_predict=n_predict))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model, speculator.to(torch.bfloat16).eval()


def measure(model, speculator, batch: int, context: int, copied: float, args):
    """Yields what a step takes with each method after one round, and after all, in turn, against the floor, too."""
    times = {method: [] for method in args.methods}

    def seconds(method: str, n_tokens: int) -> float:
        return generate(model, speculator, method, batch, context, n_tokens, max_cache_len=context + 2 * args.steps)

    def time_step(method: str) -> None:
        times[method].append((seconds(method, 2 * args.steps) - seconds(method, args.steps)) / args.steps)

    for method in args.methods:
        first = seconds(method, 2 * args.steps)
        seconds(method, args.steps)  # other sizes are other kernels, which are loaded when they are first called
        time_step(method)
        yield {f"{method}_first_call_s": first, f"{method}_ms": 1000 * times[method][0]}
    for _ in range(args.rounds - 1):
        for method in args.methods:
            time_step(method)
    row = {f"{method}_ms": 1000 * statistics.median(of) for method, of in times.items()}
    read = step_bytes(model, speculator, batch * (context + 1.5 * args.steps))
    for method in read.keys() & times.keys():
        row[f"{method}_floor_ms"] = 1000 * read[method] / copied
        row[f"{method}_over_floor"] = row[f"{method}_ms"] / row[f"{method}_floor_ms"]
    if read.keys() <= times.keys():
        row["break_even"] = row["speculative_ms"] / row["loop_ms"]
    yield row


def generate(model, speculator, method: str, batch: int, context: int, n_tokens: int, max_cache_len: int) -> float:
    """Seconds of one call."""
    how, _, what = method.rpartition("_")
    options = {} if how == "eager" else {"cache_implementation": "static", "max_cache_len": max_cache_len}
    if what != "generate":
        speculator.config.n_candidates = 0 if what == "loop" else 5
        speculator.config.n_tree_nodes = None if what == "loop" else NODES - 1
        options["assistant_model"] = speculator
    prompt = torch.randint(model.config.vocab_size, (batch, context), device=model.device)
    options |= {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": n_tokens}
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True) if how == "unguarded" else nullcontext():
        synchronize()
        start = time.perf_counter()
        model.generate(prompt, **options)
        synchronize()
    return time.perf_counter() - start


def step_bytes(model, speculator, cached_tokens: float) -> dict[str, float]:
    """Bytes that a step has to read: embeddings are looked up, not read, unless the LM head shares them."""
    config, weights, emb = model.config, {id(p): p for p in model.parameters()}, model.get_input_embeddings().weight
    if emb is not model.get_output_embeddings().weight:
        del weights[id(emb)]
    kv_heads = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None)
    cache = 2 * config.num_hidden_layers * kv_heads * (config.hidden_size // config.num_attention_heads)
    loop = 2 * (sum(p.numel() for p in weights.values()) + cache * cached_tokens)
    drafted = sum(p.numel() for name, p in speculator.named_parameters() if ".emb." not in name)
    return {"loop": loop, "speculative": loop + 2 * drafted}


def profile(model, speculator, args, rows: int = 15) -> list[str]:
    """Where the time of the last cell's speculative steps goes: the kernels (on a CPU: operators) that take most."""
    batch, context = args.batch_sizes[-1], args.contexts[-1]
    on = torch.profiler.ProfilerActivity
    sort = "self_cuda_time_total" if args.device == "cuda" else "self_cpu_time_total"
    with torch.profiler.profile(activities=[on.CPU, on.CUDA] if args.device == "cuda" else [on.CPU]) as profiler:
        generate(model, speculator, "speculative", batch, context, args.steps, context + 2 * args.steps)
    if args.trace:
        profiler.export_chrome_trace(str(args.trace))
    return profiler.key_averages().table(sort_by=sort, row_limit=rows, max_name_column_width=90).splitlines()


if __name__ == "__main__":
    run(main, "What was printed of finished cells is in --output, where that was given; the same command starts anew.")
