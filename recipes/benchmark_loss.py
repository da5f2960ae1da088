"""Peak memory and time of the heads' cross-entropy, whole and in chunks: forward and backward of all heads.

python recipes/benchmark_loss.py
python recipes/benchmark_loss.py --device cuda --positions 8192 32768 --inner_dim 3072 --output loss_gpu.json
"""

import json
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from modeling_speculator.command_line import output_file, parser_of, positive, run, say_end
from modeling_speculator.measuring.benchmarking import machine, synchronize, versions
from modeling_speculator.precision import fast_dtype
from modeling_speculator.trainers.chunked import CHUNK_ELEMENTS, chunked_linear


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--vocab_size", type=positive, default=128256, metavar="TOKENS", help="of the vocabulary")
    parser.add_argument("--inner_dim", type=positive, default=256, metavar="WIDTH", help="of the heads' input")
    parser.add_argument("--heads", type=positive, default=4, metavar="HEADS", help="of the speculator")
    parser.add_argument(
        "--positions", type=positive, nargs="+", default=[256, 1024], metavar="POSITIONS", help="of a batch"
    )
    parser.add_argument(
        "--chunk_elements", type=positive, metavar="LOGITS", help="at a time (default: 2**27, on a CPU 2**24)"
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cuda or cpu")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="JSON, for the results (default: none)")
    args = parser.parse_args()
    args.chunk_elements = args.chunk_elements or (2**24 if args.device == "cpu" else CHUNK_ELEMENTS)
    rows = []
    for positions, way in tqdm(list(product(args.positions, WAYS)), desc="measuring", unit="way"):
        is_slow = args.device == "cpu" and positions != args.positions[0]  # minutes, from 1024 positions on
        if way.startswith("torch") and (is_slow or not hasattr(F, "linear_cross_entropy")):
            continue  # torch has it from 2.13 on
        # In a process of its own, whose memory is nobody else's.
        quietly = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}  # ended by Ctrl-C
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), **quietly) as pool:
            rows.append(pool.submit(measure, way, positions, args).result())
        tqdm.write(json.dumps(rows[-1]))
    report = {"rows": rows, "machine": machine(), "versions": versions()}
    report |= {key: getattr(args, key) for key in ("vocab_size", "inner_dim", "heads", "chunk_elements")}
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
        say_end(args.output)


def whole(heads, features, labels, args):
    """As `MLPSpeculatorPreTrainedModel.forward` does: the logits of all heads, then their losses."""
    logits = torch.stack([head(features) for head in heads])
    return sum(F.cross_entropy(logits[head].float(), labels, reduction="sum") for head in range(len(heads)))


def chunked(heads, features, labels, args):
    def score(logits, at):
        return F.cross_entropy(logits, labels[at], reduction="sum"), logits.argmax(-1)[:, None]

    return sum(chunked_linear(head, features, score, args.chunk_elements)[0] for head in heads)


def native(heads, features, labels, args):
    options = torch.nn.LinearCrossEntropyOptions()
    # In bf16 on a CPU (2.13) it takes 103 s where these take 1.6 s, and its sum is 11 % off.
    dtype = torch.float32 if features.device.type == "cpu" else torch.get_autocast_dtype(features.device.type)
    return sum(
        F.linear_cross_entropy(features.to(dtype), head.weight.to(dtype), labels, reduction="sum", options=options)
        for head in heads
    )


WAYS = {"whole": whole, "chunked": chunked, "torch's linear_cross_entropy": native}


def measure(way: str, positions: int, args) -> dict:
    """MiB above weights and inputs, seconds of the second run, and the loss; autocast to bf16 where that is fast."""
    is_fast_in_halves = fast_dtype(args.device) == torch.bfloat16
    torch.manual_seed(0)
    with torch.device(args.device):
        heads = nn.ModuleList(nn.Linear(args.inner_dim, args.vocab_size, bias=False) for _ in range(args.heads))
        features = torch.randn(positions, args.inner_dim, requires_grad=True)
        labels = torch.randint(args.vocab_size, (positions,))
    peak, times = Peak(args.device), []
    for _ in range(2):
        heads.zero_grad()
        synchronize()
        start = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16, enabled=is_fast_in_halves):
            loss = WAYS[way](heads, features, labels, args)
        loss.backward()
        synchronize()
        times.append(time.perf_counter() - start)
    return {"way": way, "positions": positions, "peak_mib": peak.read(), "seconds": times[1], "loss": loss.item()}


class Peak:
    """The most memory in use since it was made, above what was in use then: of a GPU, or of this process."""

    def __init__(self, device: str):
        self.device, self.before, self.highest = device, self.now(device), 0.0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            threading.Thread(target=self.watch, daemon=True).start()

    @staticmethod
    def now(device: str) -> float:
        if device == "cuda":
            return torch.cuda.memory_allocated() / 2**20
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    def watch(self) -> None:
        while True:
            self.highest = max(self.highest, self.now("cpu"))
            time.sleep(0.001)

    def read(self) -> float:
        highest = torch.cuda.max_memory_allocated() / 2**20 if self.device == "cuda" else self.highest
        return highest - self.before


if __name__ == "__main__":
    run(main)
