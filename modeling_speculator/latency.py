"""Latency of ways to decode, side by side: time to the first token and per token, tokens per step, memory."""

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from tqdm import tqdm

from .benchmarking import seconds_in_turn
from .methods import Method


Batches = list[tuple[torch.Tensor, torch.Tensor]]  # input_ids and attention_mask, (batch, length)


def measure_latency(model, methods: list[Method], batches: Batches, new_tokens: int, rounds: int) -> list[dict]:
    """Times methods on the same prompts, in turn, each after one untimed run.

    All generate `new_tokens` tokens a row, past an end of text, too. A method that fails has its error in its row.

    Args:
        methods: of `expand_methods`; the first is what the others are compared with.

    Returns:
        A row a method: medians over the rounds, and their spread.
    """
    with _endless(model):
        texts, rows, runs = {}, {}, {}
        for number, method in enumerate(tqdm(methods, desc="warm-up", leave=False)):
            rows[number] = {"method": method.name} | method.dials
            run = partial(_generate, model, method, batches)
            if method.reason is not None:
                rows[number]["skipped"] = method.reason
                continue
            try:
                texts[number], rows[number]["tokens_per_step"] = _untimed(model, run, new_tokens)
                run(1)
                rows[number] |= _peak_memory(lambda run=run: run(new_tokens))
            except Exception as error:  # the others go on
                rows[number]["error"] = f"{type(error).__name__}: {error}"
                gc.collect()
                continue
            runs |= {(number, "first"): partial(run, 1), (number, "all"): partial(run, new_tokens)}
        seconds = seconds_in_turn(runs, rounds)
    n_rows = sum(len(input_ids) for input_ids, _ in batches)
    for number in texts:
        whole, first = seconds[number, "all"], seconds[number, "first"]
        rates = [n_rows * new_tokens / each for each in whole]
        per_token = [(all_ - one) / (new_tokens - 1) / len(batches) for all_, one in zip(whole, first, strict=True)]
        rows[number] |= {
            "tokens_per_second": statistics.median(rates),
            "tokens_per_second_range": [min(rates), max(rates)],
            "first_token_ms": 1000 * statistics.median(first) / len(batches),
            "ms_per_token": 1000 * statistics.median(per_token),
        }
        if 0 in texts:
            ratios = [plain / own for plain, own in zip(seconds[0, "all"], whole, strict=True)]
            pairs = zip(torch.cat(texts[0]), torch.cat(texts[number]), strict=True)
            rows[number] |= {
                "speedup": statistics.median(ratios),
                "identical_outputs": sum(torch.equal(one, other) for one, other in pairs),
                "outputs": n_rows,
            }
    return list(rows.values())


def _generate(model, method: Method, batches: Batches, new_tokens: int) -> list:
    """One run over all batches: the outputs of `generate`."""
    for dial, value in method.dials.items():
        setattr(method.drafter.config, dial, value)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    if "cache_implementation" in method.options:  # of one size, so that nothing is compiled twice
        options["max_cache_len"] = max(input_ids.shape[1] for input_ids, _ in batches) + 2 * new_tokens
    return [model.generate(ids, attention_mask=mask, **options | method.options) for ids, mask in batches]


def _untimed(model, run: Callable, new_tokens: int) -> tuple[list[torch.Tensor], float]:
    """The texts of a run and its tokens per step, from our statistics, or from the forwards that the model made."""
    forwards, layers = [0], model.config.get_text_config(decoder=True).num_hidden_layers

    def count(module, args) -> None:  # early exit drafts with the same model, some layers short
        forwards[0] += module.config.get_text_config(decoder=True).num_hidden_layers == layers

    handle = model.register_forward_pre_hook(count)
    try:
        outputs = run(new_tokens)
    finally:
        handle.remove()
    if hasattr(outputs[0], "speculation"):
        steps = sum(out.speculation.steps for out in outputs)
        tokens_per_step = sum(out.speculation.tokens for out in outputs) / max(1, steps)
    else:  # a prefill a batch; then a forward is a step of every row
        tokens_per_step = (new_tokens - 1) * len(outputs) / max(1, forwards[0] - len(outputs))
    return [out.sequences for out in outputs], tokens_per_step


def _peak_memory(run: Callable) -> dict[str, float]:
    """GiB allocated on the GPU at most; nothing without one."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.reset_peak_memory_stats()
    run()
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}


@contextmanager
def _endless(model) -> Iterator[None]:
    """Takes the base model's end of text away, so that every run generates as many tokens."""
    config = model.generation_config
    eos_token_id, config.eos_token_id = config.eos_token_id, None
    try:
        yield
    finally:
        config.eos_token_id = eos_token_id
