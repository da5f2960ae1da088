"""Gives a speculator that drafts by the base model's LM head a draft vocabulary: the tokens most frequent in texts.

python recipes/draft_vocabulary.py --base_model outputs/smollm2-135m/base_model \\
    --speculator outputs/smollm2-135m/context --data_files outputs/smollm2-135m/generated/*.parquet --tokens 8192 \\
    --output outputs/smollm2-135m/context_8192

What is drafted changes, never what is emitted. Best are texts that the base model wrote itself: a training's
`generated_dataset`, whose parquet files hold the token ids. The base model's end tokens are always among the chosen.
"""

from collections import Counter
from pathlib import Path

import datasets
from transformers import AutoModel, GenerationConfig

from modeling_speculator.command_line import command_of, output_folder, parser_of, positive, run, say_end
from modeling_speculator.loading import base_model_config, load_tokenizer, speculator_config
from modeling_speculator.model_cards.provenance_file import trusted_provenance, write_provenance
from modeling_speculator.trainers.data import DataArguments, load_texts
from modeling_speculator.trainers.documents import LeftOut, tokenized


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--speculator", required=True, metavar="FOLDER_OR_ID", help="method residual or context")
    parser.add_argument("--base_model", required=True, metavar="FOLDER_OR_ID", help="whose tokens they are")
    parser.add_argument("--data_files", required=True, nargs="+", metavar="FILE", help="texts, or continuations")
    parser.add_argument("--text_column", default="text", metavar="NAME", help="of the column of texts")
    parser.add_argument("--tokens", type=positive, default=8192, metavar="TOKENS", help="to draft from")
    parser.add_argument("--output", type=output_folder, required=True, metavar="FOLDER", help="a new one")
    args = parser.parse_args()
    if args.output.is_dir() and any(args.output.iterdir()):
        parser.error(f"{args.output} is not empty: take a new folder.")
    if not hasattr(speculator_config(args.speculator), "draft_vocabulary"):
        raise ValueError(
            f"{args.speculator} has a vocabulary of its own. A draft vocabulary is for methods residual and context."
        )
    speculator = AutoModel.from_pretrained(args.speculator)
    ends = end_tokens(args.base_model)
    counts = count_tokens(args, ends)
    if args.tokens < max(len(ends), max(speculator.config.top_k_tokens_per_head)):
        raise ValueError("--tokens must leave room for what a head drafts, and for the base model's end tokens.")
    known = [token for token, _ in counts.most_common() if token < speculator.config.vocab_size]
    chosen = sorted(dict.fromkeys([*ends, *known][: args.tokens]))
    speculator.config.draft_vocabulary = chosen
    if len(chosen) < max(speculator.config.top_k_tokens_per_head):
        raise ValueError("The texts hold fewer different tokens than a head drafts: give more of them.")
    speculator.config.check_draft_vocabulary()
    speculator.save_pretrained(args.output)
    if provenance := trusted_provenance(args.speculator):
        write_provenance(args.output, provenance)
    share = sum(counts[token] for token in chosen) / counts.total()
    print(f"{len(chosen)} of {speculator.config.vocab_size} tokens, which are {share:.1%} of the texts")
    measure = command_of(
        "evaluate_acceptance.py", base_model=args.base_model, speculator=args.output, prompts="PROMPTS.jsonl"
    )
    say_end(args.output, then={"see what it loses": measure})


def count_tokens(args, ends: list[int]) -> Counter:
    """How often each token occurs; of a continuation, up to its end."""
    counts = Counter()
    if {Path(file).suffix for file in args.data_files} == {".parquet"}:
        rows = datasets.load_dataset("parquet", data_files=args.data_files, split="train")
        if "continuation" in rows.column_names:
            for row in rows:
                text = row["continuation"]
                end = next((at for at, token in enumerate(text) if token in ends), len(text))
                counts.update(text[: end + 1])
            return counts
    texts = load_texts(DataArguments(data_files=args.data_files, text_column=args.text_column))
    for document in tokenized(texts, load_tokenizer(args.base_model), args.text_column, LeftOut()):
        counts.update(document.tolist())
    return counts


def end_tokens(base_model: str) -> list[int]:
    """All tokens that may end what the base model writes."""
    try:
        ends = GenerationConfig.from_pretrained(base_model).eos_token_id
    except OSError:  # it has none
        ends = base_model_config(base_model).get_text_config(decoder=True).eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


if __name__ == "__main__":
    run(main, "What was written of --output is not whole: delete it.")
