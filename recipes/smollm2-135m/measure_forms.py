"""Tokens per step of speculators of several forms on the same greedy texts: in chains and in trees, with lookup
branches and without.

python recipes/smollm2-135m/measure_forms.py --base_model outputs/smollm2-135m/base_model \
    --prompts spec_bench.jsonl --speculators outputs/smollm2-135m/forms/*

Every figure is simulated on what the base model writes after the first turn of each prompt, which is exact where the
same dtype verifies. Texts are kept in the output folder; a second run measures what is new.
"""

import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModel

from modeling_speculator.command_line import output_folder, parser_of, positive, run, say_end
from modeling_speculator.drafters import turned
from modeling_speculator.loading import load_base_model
from modeling_speculator.measuring.evaluation import (
    accepted_drafts,
    accepted_lookups,
    loops,
    simulate_emissions,
    starts_of_drafts,
)
from modeling_speculator.measuring.prompts import encode, pad_left, read_prompts
from modeling_speculator.vocabularies import beside


LOOKUP_TOKENS = 8
SHORT = 384  # tokens of a prompt


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--base_model", required=True, metavar="FOLDER_OR_ID", help="that writes the texts")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="of Spec-Bench, say")
    parser.add_argument(
        "--speculators",
        nargs="*",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="to measure (default: write the texts)",
    )
    parser.add_argument("--max_new_tokens", type=positive, default=160, metavar="TOKENS", help="of each text")
    parser.add_argument("--batch_size", type=positive, default=16, metavar="PROMPTS", help="at once")
    parser.add_argument("--device", metavar="DEVICE", help="that all runs on (default: the GPU, where there is one)")
    parser.add_argument(
        "--output_dir",
        type=output_folder,
        default=Path("outputs/smollm2-135m/measured"),
        metavar="FOLDER",
        help="for the texts, and a JSON file for each speculator",
    )
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_base_model(str(args.base_model), "float32", args.device)
    texts = written_texts(args, model, tokenizer)
    for folder in args.speculators:
        file = args.output_dir / f"{folder.name}.json"
        if not file.exists():
            speculator = AutoModel.from_pretrained(folder).to(args.device).eval()
            measured = measure(model, speculator, texts, args)
            described = {"form": folder.name, "prompts": Path(args.prompts).name} | measured
            file.write_text(json.dumps(described, indent=1) + "\n")
            print(table_row(folder.name, measured), flush=True)
    say_end(args.output_dir)


def written_texts(args, model, tokenizer) -> list[dict]:
    """Token ids of each prompt and of what the base model writes after it, shortest prompts first."""
    file = args.output_dir / "texts.json"
    if not file.exists():
        prompts = read_prompts(args.prompts)
        rows = encode(prompts, [[] for _ in prompts], tokenizer, chat=tokenizer.chat_template is not None)
        texts = []
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        for at in tqdm(range(0, len(order), args.batch_size), desc="texts", unit="batch"):
            some = order[at : at + args.batch_size]
            ids, mask = (part.to(args.device) for part in pad_left([rows[number] for number in some]))
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=0
            )
            for number, text in zip(some, out[:, ids.shape[1] :].tolist(), strict=True):
                ends = [place for place, token in enumerate(text) if token in eos_of(model)]
                text = text[: ends[0] + 1] if ends else text
                category = prompts[number].category
                texts.append({"number": number, "category": category, "prompt": rows[number], "text": text})
        file.write_text(json.dumps(texts))
    return json.loads(file.read_text())


def eos_of(model) -> list[int]:
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [eos]


def ways(config) -> dict[str, dict]:
    """What is drafted: dials by name."""
    heads, top_k = config.n_predict, config.top_k_tokens_per_head
    own = {"n_tree_nodes": None, "n_heads": None, "n_candidates": config.n_candidates, "top_k_tokens_per_head": top_k}
    chain = own | {"top_k_tokens_per_head": [1] * heads, "n_candidates": 1}
    wide = [8, 4, 3, 2, 2, 2, 2][:heads]
    tree = own | {"top_k_tokens_per_head": wide, "n_candidates": 1}
    return {
        "chain of 3": chain | {"n_heads": min(3, heads)},
        "chain": chain,
        "tree of 8": tree | {"n_tree_nodes": 8},
        "tree of 16": tree | {"n_tree_nodes": 16},
    }


@torch.no_grad()
def measure(model, speculator, texts: list[dict], args) -> dict:
    """Tokens and steps of each text, by way; summed up."""
    drafter, n_predict = beside(model, speculator), speculator.config.n_predict
    names = ways(speculator.config)
    steps = {name: [] for way in names for name in (way, f"{way} + lookup")} | {"lookup": []}
    for at in tqdm(range(0, len(texts), args.batch_size), desc="drafts", unit="batch", leave=False):
        some = texts[at : at + args.batch_size]
        prompts, mask = (part.to(args.device) for part in pad_left([text["prompt"] for text in some]))
        lengths = torch.tensor([len(text["text"]) for text in some], device=args.device)
        width = int(lengths.max())
        padded = torch.tensor([text["text"] + [-100] * (width - len(text["text"])) for text in some]).to(args.device)
        starts = starts_of_drafts(model, drafter, torch.cat([prompts, padded.clamp(min=0)], 1), mask)
        starts = starts[:, prompts.shape[1] - 1 :]
        tokens = torch.nn.functional.pad(padded, (0, n_predict), value=-100)
        looked_up = accepted_lookups(prompts, mask, padded, LOOKUP_TOKENS)
        accepted = {"lookup": looked_up}
        for way, dials in names.items():
            with turned(speculator, dials):
                accepted[way] = accepted_drafts(drafter, starts, tokens)
            accepted[f"{way} + lookup"] = torch.maximum(accepted[way], looked_up)
        for name, numbers in accepted.items():
            steps[name] += (simulate_emissions(numbers, lengths) > 0).sum(-1).tolist()
    return {
        "method": speculator.config.method,
        "n_predict": n_predict,
        "parameters": speculator.num_parameters(),
        "texts": len(texts),
        "looping": sum(loops(text["text"]) for text in texts),
        "tokens_per_step": {name: shares(texts, numbers) for name, numbers in steps.items()},
    }


def shares(texts: list[dict], steps: list[int]) -> dict:
    """Tokens per step of all texts, of those after short prompts, without loops, and by category."""
    pairs = list(zip(texts, steps, strict=True))
    parts = {
        "all": pairs,
        "without loops": [pair for pair in pairs if not loops(pair[0]["text"])],
        "short": [pair for pair in pairs if len(pair[0]["prompt"]) <= SHORT],
    }
    parts["short, without loops"] = [pair for pair in parts["short"] if not loops(pair[0]["text"])]
    for category in sorted({text["category"] for text in texts}):
        parts[category] = [pair for pair in pairs if pair[0]["category"] == category]
    tokens = {name: sum(len(text["text"]) - 1 for text, _ in part) for name, part in parts.items()}
    return {
        name: round(tokens[name] / max(1, sum(n for _, n in part)), 4) for name, part in parts.items() if tokens[name]
    }


def table_row(name: str, measured: dict) -> str:
    found = measured["tokens_per_step"]
    return f"{name}: {measured['parameters']:,} parameters; " + "; ".join(
        f"{way} {found[way]['short']:.3f} ({found[way]['short, without loops']:.3f})"
        for way in ("chain of 3", "chain of 3 + lookup", "tree of 16", "tree of 16 + lookup", "lookup")
    )


if __name__ == "__main__":
    run(main)
