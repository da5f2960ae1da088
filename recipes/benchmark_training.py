"""What a step of training costs beside its parts, and how fast stage 2 generates: `make bench-training`.

python recipes/benchmark_training.py
python recipes/benchmark_training.py --target llama2-7b --device cuda --output recipes/results/training_gpu.json

Base models of the given shapes with random weights, in the dtype that is fast here; the batches are those of the
published recipe on a GPU, small ones on a CPU. A step is the trainer's own, data and optimizer included.
"""

import json
import statistics
import time
import timeit
from itertools import pairwise
from tempfile import TemporaryDirectory

import datasets
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.command_line import output_file, parser_of, positive, run, say_end
from modeling_speculator.measuring.benchmarking import machine, speedup, synchronize, time_in_turn, versions
from modeling_speculator.precision import fast_dtype
from modeling_speculator.trainers import DistillationTrainer, SpeculatorTrainer, SpeculatorTrainingArguments


SMALL = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_hidden_layers": 8}
LLAMA3 = {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
# Shape, heads and their width; rows and length of stage 1, rows of stage 2.
TARGETS = {
    "small": (LlamaConfig(**SMALL, vocab_size=32000), 3, 512, 4, 256, 16),
    "tiny": (LlamaConfig(**SMALL | {"hidden_size": 64, "num_hidden_layers": 2}, vocab_size=512), 3, 64, 4, 64, 4),
    "llama2-7b": (LlamaConfig(vocab_size=32000), 3, 4096, 8, 4096, 96),
    "llama3.1-8b": (LlamaConfig(**LLAMA3, max_position_embeddings=8192), 4, 3072, 8, 4096, 96),
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--target", choices=TARGETS, default="small", help="shapes of models, and their batches")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cuda or cpu")
    parser.add_argument("--rounds", type=positive, default=3, metavar="ROUNDS", help="whose median counts")
    parser.add_argument("--steps", type=positive, default=8, metavar="STEPS", help="of a round, 4 at least")
    parser.add_argument(
        "--new_tokens", type=positive, default=64, metavar="TOKENS", help="of stage 2; the published recipe has 256"
    )
    parser.add_argument("--output", type=output_file, metavar="FILE", help="JSON, for the results (default: none)")
    args = parser.parse_args()
    if args.steps < 4:
        parser.error("--steps is at least 4, two of which warm up")
    with TemporaryDirectory() as folder:
        report = {
            "target": args.target,
            "stage1": stage1(args, folder),
            "stage2": stage2(args, folder),
            "machine": machine(),
            "versions": versions(),
        }
    if args.device == "cuda":  # on as many GPUs as one likes, without their communication
        steps = 15_000 * report["stage1"]["step_s"] + 6_000 * report["stage2"]["step_s"]
        report["hours_of_the_published_21000_steps"] = steps / 3600
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
        say_end(args.output)


def build(args, folder: str, trainer_class, rows: int, length: int, **options):
    """A trainer of random models of the target's shape."""
    config, n_predict, inner_dim, *_ = TARGETS[args.target]
    dtype = fast_dtype(args.device)
    with torch.device(args.device):
        base_model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    base_model.generation_config.eos_token_id = None
    shape = {"vocab_size": config.vocab_size, "emb_dim": config.hidden_size, "inner_dim": inner_dim}
    speculator = MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(**shape, n_predict=n_predict))
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 4}
    sizes = {"max_steps": args.steps, "per_device_train_batch_size": rows}
    sizes |= {"bf16": dtype == torch.bfloat16, "use_cpu": args.device == "cpu"}
    training_args = SpeculatorTrainingArguments(folder, **sizes, **quiet)
    tokens = torch.randint(config.vocab_size, (rows * args.steps, length))
    data = datasets.Dataset.from_dict({"input_ids": tokens.numpy()}).with_format("torch")
    clock = Clock()
    options |= {"train_dataset": data, "callbacks": [clock], "generation_length": args.new_tokens}
    return trainer_class(speculator, base_model, training_args, **options), clock, tokens[:rows].to(args.device)


class Clock(TrainerCallback):
    """When each step of a training ended."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.ends.append(time.perf_counter())

    def step(self) -> float:
        """Median seconds, without the first two."""
        return statistics.median(end - start for start, end in pairwise(self.ends[1:]))


def seconds(run, repeats: int) -> float:
    return statistics.median(timeit.repeat(lambda: (run(), synchronize()), number=1, repeat=repeats))


def stage1(args, folder: str) -> dict:
    _, _, _, rows, length, _ = TARGETS[args.target]
    trainer, clock, text = build(args, folder, SpeculatorTrainer, rows, length)
    batch = trainer.batch({"input_ids": text})

    def speculate():  # with autocast, as in training
        trainer.model_wrapped(*batch[:3], objective=trainer.objective).loss.backward()

    rounds = []
    for _ in tqdm(range(args.rounds), desc="stage 1", unit="round"):
        trainer.train()
        parts = [seconds(lambda: trainer.batch({"input_ids": text}), args.steps), seconds(speculate, args.steps)]
        trainer.model.zero_grad()
        rounds.append([clock.step(), *parts])
    step, base_model, speculator = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "step_s": step,
        "base_model_s": base_model,
        "speculator_s": speculator,
        "step_over_parts": statistics.median(step / (base + own) for step, base, own in rounds),
        "tokens_per_second": rows * length / step,
    } | gpu_memory()


def stage2(args, folder: str) -> dict:
    rows = TARGETS[args.target][5]
    trainer, clock, prompts = build(args, folder, DistillationTrainer, rows, 64)
    trainer.train()

    def generate() -> int:
        options = {"do_sample": True, "top_k": 10, "max_new_tokens": args.new_tokens, "pad_token_id": 0}
        trainer.base_model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        return rows * args.new_tokens

    write = {"with states": lambda: trainer.sampler(prompts, 0).tokens.numel()}
    rates = time_in_turn({"generate": generate} | write, args.rounds, desc="stage 2")
    return {
        "step_s": clock.step(),
        "generate_tokens_per_second": statistics.median(rates["generate"]),
        "tokens_per_second": statistics.median(rates["with states"]),
        "over_generate": speedup(rates, of="with states", over="generate"),
    } | gpu_memory()


def gpu_memory() -> dict:
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}


if __name__ == "__main__":
    run(main)
