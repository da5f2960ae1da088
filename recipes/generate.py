"""Try a speculator from the terminal.

python recipes/generate.py --base_model X --speculator Y --prompt "def quicksort(numbers):" --stream --color
python recipes/generate.py --base_model X --speculator Y --prompts prompts.jsonl --batch_size 4
python recipes/generate.py --base_model X --speculator Y --chat          # an empty line ends it
python recipes/generate.py --base_model X --speculator Y --prompt "def quicksort(numbers):" --compare
--color streams, and changes the colour with every step: what has one colour came from one forward of the base model.
--compare generates plainly, too, and says whether the text is the same, and how much faster it came.
--html trace.html draws the text by its steps: accepted and rejected drafts, and what the base model thinks of each.
After the text, in brackets: what the speculator achieved, of all prompts of a batch together.
--speculator lookup needs no speculator: the text's own repetitions are drafted.
"""

import argparse
import itertools
import sys
import time

import torch
from transformers import DynamicCache

from modeling_speculator import SpeculationStatistics
from modeling_speculator.command_line import count, output_file, parser_of, positive, run, say_end, temperature
from modeling_speculator.loading import load_base_model, load_speculator_or_lookup
from modeling_speculator.measuring.benchmarking import machine, machine_name
from modeling_speculator.measuring.prompts import read_prompts
from modeling_speculator.measuring.streamer import StepStreamer
from modeling_speculator.measuring.trace_page import render, traced_texts
from modeling_speculator.transformers_api import CACHE


DIALS = {
    "n_candidates": (count, "CANDIDATES", "drafted per step; 0: no speculation"),
    "n_tree_nodes": (positive, "NODES", "drafted per step, the most probable ones"),
    "n_heads": (positive, "HEADS", "that draft, the first ones"),
    "n_lookup_tokens": (count, "TOKENS", "of a branch that repeats the text"),
}


def main() -> None:
    args = parse_args()
    prompts = [prompt.turns[0] for prompt in read_prompts(args.prompts)] if args.prompts else [args.prompt]
    model, tokenizer = load_base_model(args.base_model)
    tokenizer.padding_side, tokenizer.model_input_names = "left", ["input_ids", "attention_mask"]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)  # it is masked: any will do
    if args.chat and tokenizer.chat_template is None:
        raise ValueError(f"{args.base_model} has no chat template. Use --prompt.")
    speculator = load_speculator_or_lookup(args.speculator, model)
    speculator.config.update({dial: value for dial in DIALS if (value := getattr(args, dial)) is not None})
    if args.chat:
        return chat(args, model, tokenizer, speculator)
    model.generation_config.trace_speculation = args.html is not None
    traced = []
    for at in range(0, len(prompts), args.batch_size):
        batch = tokenizer(prompts[at : at + args.batch_size], return_tensors="pt", padding=True).to(model.device)
        out = answer(args, model, tokenizer, speculator, **batch)
        traced += traced_texts(out, **batch) if args.html else []
    if args.html:
        facts = {"base model": args.base_model, "speculator": args.speculator, "machine": machine_name(machine())}
        args.html.write_text(render(traced, tokenizer, facts), encoding="utf-8")
        say_end(args.html)


def parse_args() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--base_model", required=True, metavar="FOLDER_OR_ID", help="the model that writes")
    parser.add_argument("--speculator", required=True, metavar="FOLDER_OR_ID", help="a speculator for it, or lookup")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="to continue")
    what.add_argument(
        "--prompts", metavar="FILE_OR_ID", help="as evaluate_acceptance.py --help describes them; first turns"
    )
    what.add_argument("--chat", action="store_true", help="a conversation, with the base model's chat template")
    parser.add_argument("--stream", action="store_true", help="show tokens as they come")
    parser.add_argument("--color", action="store_true", help="another colour for every step")
    parser.add_argument("--compare", action="store_true", help="generate plainly, too")
    parser.add_argument(
        "--html", type=output_file, metavar="FILE", help="a page that shows every draft; slower (default: none)"
    )
    parser.add_argument("--batch_size", type=positive, default=1, metavar="PROMPTS", help="continued at once")
    parser.add_argument("--max_new_tokens", type=positive, default=200, metavar="TOKENS", help="after each prompt")
    parser.add_argument("--temperature", type=temperature, default=0.0, metavar="NUMBER", help="0: greedy")
    for dial, (kind, unit, what_of) in DIALS.items():
        own = f"{what_of} (default: the speculator's own)"
        parser.add_argument(f"--{dial}", type=kind, metavar=unit, help=own)
    args = parser.parse_args()
    args.stream |= args.color
    if args.stream and args.batch_size > 1:
        parser.error("--stream and --color show one text at a time: drop --batch_size")
    if args.compare and args.chat:
        parser.error("--compare is for --prompt and --prompts")
    if args.html and (args.chat or args.compare):
        parser.error("--html is for --prompt and --prompts, and takes time: drop --chat and --compare")
    return args


def answer(args, model, tokenizer, speculator, **inputs):
    """Shows what follows on some prompts, and how it came; returns what `generate` did."""
    if args.compare:  # the first calls are slower than the others
        for drafter in (speculator, None):
            generate(args, model, tokenizer, drafter, **inputs, max_new_tokens=2)
    streamer = StepStreamer(tokenizer, model, args.color) if args.stream else None
    out, rate = generate(args, model, tokenizer, speculator, **inputs, streamer=streamer)
    texts = decode(tokenizer, out, **inputs)
    if not args.stream:
        print(*texts, sep="\n")
    print(f"[{in_words(out.speculation, len(texts))}; {rate:.1f} tokens/s]", flush=True)
    if args.compare:
        plain, plain_rate = generate(args, model, tokenizer, None, **inputs)
        others = decode(tokenizer, plain, **inputs)
        speed = f"at {plain_rate:.1f} tokens/s; with the speculator {rate / plain_rate:.2f} times as fast in this run"
        if others == texts:
            print(f"[plain generate writes the same {speed}]")
        else:
            print(f"[plain generate writes {speed}:]", *others, sep="\n")
    return out


def generate(args, model, tokenizer, drafter, **options) -> tuple:
    """What `generate` returns, plainly where there is no drafter, and its tokens per second."""
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    options = {"max_new_tokens": args.max_new_tokens, "assistant_model": drafter} | sampling | options
    start = time.perf_counter()
    out = model.generate(**options, pad_token_id=tokenizer.pad_token_id, return_dict_in_generate=True)
    seconds = time.perf_counter() - start
    new, eos = out.sequences[:, options["input_ids"].shape[1] :], model.generation_config.eos_token_id
    ends = torch.isin(new, torch.tensor([] if eos is None else eos, device=new.device)).long()
    n_tokens = int((ends.cumsum(-1) - ends == 0).sum())  # up to each row's end, which counts, too
    return out, n_tokens / seconds


def decode(tokenizer, out, input_ids: torch.Tensor, **inputs) -> list[str]:
    return tokenizer.batch_decode(out.sequences[:, input_ids.shape[1] :], skip_special_tokens=True)


def in_words(speculation: SpeculationStatistics, rows: int) -> str:
    """What a speculator achieved, as one reads it; each row's first token is the prefill's."""
    n_tokens = speculation.tokens + rows
    total = f"{n_tokens} token{'s' if n_tokens > 1 else ''}"
    if not speculation.steps:
        return f"{total}, none of them in a step"
    positions = " ".join(str(position) for position in range(1, speculation.n_predict + 1))
    shares = " / ".join(f"{100 * share:.0f}" for share in speculation.accepted_per_position)
    return (
        f"{total}, {speculation.tokens} of them in {speculation.steps} steps: {speculation.tokens_per_step:.2f} "
        f"tokens per step; drafts accepted at positions {positions}: {shares} %"
    )


def chat(args, model, tokenizer, speculator) -> None:
    """A conversation whose cache is kept between the turns, as far as the template repeats what was said."""
    messages, text, cache = [], [], None
    print("> ", end="", flush=True)
    while line := sys.stdin.readline().strip():
        messages.append({"role": "user", "content": line})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, text, strict=False)))
        if cache is None or same < cache.get_seq_length():
            cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        ids = torch.tensor([ids], device=model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: cache}
        text = answer(args, model, tokenizer, speculator, **inputs).sequences[0].tolist()
        said = tokenizer.decode(text[ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": said})
        print("> ", end="", flush=True)


if __name__ == "__main__":
    run(main)
