"""Try a speculator from the terminal.

python recipes/generate.py --base_model X --speculator Y --prompt "def quicksort(numbers):" --stream --color
python recipes/generate.py --base_model X --speculator Y --prompts prompts.jsonl --batch_size 4
python recipes/generate.py --base_model X --speculator Y --chat          # an empty line ends it
--color streams, and changes the colour with every step: what has one colour came from one forward of the base model.
"""

import argparse
import itertools
import sys
import time

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from modeling_speculator.command_line import count, parser_of, positive, run, temperature
from modeling_speculator.loading import load_base_model, load_speculator
from modeling_speculator.measuring.prompts import read_prompts
from modeling_speculator.transformers_api import CACHE


COLORS, PLAIN = ("\033[36m", "\033[33m"), "\033[0m"
DIALS = {"n_candidates": count, "n_tree_nodes": positive, "n_heads": positive}


def main() -> None:
    args = parse_args()
    prompts = [prompt.turns[0] for prompt in read_prompts(args.prompts)] if args.prompts else [args.prompt]
    model, tokenizer = load_base_model(args.base_model)
    tokenizer.padding_side, tokenizer.model_input_names = "left", ["input_ids", "attention_mask"]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)  # it is masked: any will do
    if args.chat and tokenizer.chat_template is None:
        raise ValueError(f"{args.base_model} has no chat template. Use --prompt.")
    speculator = load_speculator(args.speculator, model)
    speculator.config.update({dial: value for dial in DIALS if (value := getattr(args, dial)) is not None})
    if args.chat:
        return chat(args, model, tokenizer, speculator)
    for at in range(0, len(prompts), args.batch_size):
        batch = tokenizer(prompts[at : at + args.batch_size], return_tensors="pt", padding=True).to(model.device)
        out = generate(args, model, tokenizer, speculator, **batch)
        if not args.stream:
            new = out.sequences[:, batch.input_ids.shape[1] :]
            print(*tokenizer.batch_decode(new, skip_special_tokens=True), sep="\n")


def parse_args() -> argparse.Namespace:
    parser = parser_of(__doc__)
    for model in ("--base_model", "--speculator"):
        parser.add_argument(model, required=True, help="folder or Hub id")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt")
    what.add_argument("--prompts", help="file or dataset, see evaluate_acceptance.py; first turns")
    what.add_argument("--chat", action="store_true", help="a conversation, with the base model's chat template")
    parser.add_argument("--stream", action="store_true", help="show tokens as they come")
    parser.add_argument("--color", action="store_true", help="another colour for every step")
    parser.add_argument("--batch_size", type=positive, default=1)
    parser.add_argument("--max_new_tokens", type=positive, default=200)
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0: greedy")
    for dial, kind in DIALS.items():
        parser.add_argument(f"--{dial}", type=kind, help="instead of the speculator's own")
    args = parser.parse_args()
    args.stream |= args.color
    if args.stream and args.batch_size > 1:
        parser.error("--stream and --color show one text at a time: drop --batch_size")
    return args


def generate(args, model, tokenizer, speculator, **inputs):
    """Generates and reports; streams if asked to."""
    start = time.perf_counter()
    out = model.generate(
        **inputs,
        **({"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}),
        assistant_model=speculator,
        streamer=StepStreamer(tokenizer, model, args.color) if args.stream else None,
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
    )
    n_tokens = out.speculation.tokens + len(out.sequences)  # those of the prefill, too
    print(f"[{n_tokens} tokens, {n_tokens / (time.perf_counter() - start):.1f} a second; {out.speculation}]")
    return out


class StepStreamer(BaseStreamer):
    """Prints text as it comes, the tokens of each forward of the base model in another colour."""

    def __init__(self, tokenizer, model, color: bool):
        self.tokenizer, self.color = tokenizer, color
        self.tokens, self.shown, self.forwards = None, "", 0
        self.handle = model.register_forward_hook(self.count)

    def count(self, *args) -> None:
        self.forwards += 1

    def put(self, value: torch.Tensor) -> None:
        if self.tokens is None:  # the prompt
            self.tokens = []
            return
        self.tokens += value.tolist()
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # the middle of a character
            self.show(text)

    def show(self, text: str) -> None:
        color, end = (COLORS[self.forwards % 2], PLAIN) if self.color else ("", "")
        print(color + text[len(self.shown) :] + end, end="", flush=True)
        self.shown = text

    def end(self) -> None:
        self.show(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
        self.handle.remove()
        print()


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
        out = generate(args, model, tokenizer, speculator, **inputs)
        text = out.sequences[0].tolist()
        answer = tokenizer.decode(text[ids.shape[1] :], skip_special_tokens=True)
        if not args.stream:
            print(answer)
        messages.append({"role": "assistant", "content": answer})
        print("> ", end="", flush=True)


if __name__ == "__main__":
    run(main)
