"""Trains a small Llama on text, and a tokenizer, unless it is given one.

python recipes/quickstart/train_base_model.py --corpus corpus/train.jsonl --output_dir base_model
python recipes/quickstart/train_base_model.py --corpus corpus/train.jsonl --output_dir draft_model \\
    --tokenizer base_model --num_hidden_layers 1
"""

import argparse
import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from modeling_speculator.command_line import (
    FROM_CHECKPOINT,
    command_of,
    parser_of,
    positive,
    positive_number,
    run,
    say_end,
)
from modeling_speculator.measuring.benchmarking import machine, versions
from modeling_speculator.model_cards.provenance_file import read_provenance, write_provenance
from modeling_speculator.precision import PRECISIONS, go_on_in
from modeling_speculator.trainers import (
    DataArguments,
    SafeTrainer,
    hold,
    latest_checkpoint,
    load_texts,
    open_run,
    pack,
    training_settings,
)
from modeling_speculator.trainers.contents import of_files, of_model
from modeling_speculator.trainers.pace import TimedSaves, seconds_per_step, spoken, steps_within


END_OF_TEXT = "<|endoftext|>"
SEQUENCE_LENGTH = 256


def main() -> None:
    args = parse_args()
    with hold(args.output_dir):
        train(args)


def train(args: argparse.Namespace) -> None:
    begun = read_provenance(args.output_dir) if args.output_dir.is_dir() else None  # perhaps on another machine
    precision = go_on_in(begun["precision"] if begun else None, args.precision)
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else train_tokenizer(args.corpus)
    texts = load_texts(DataArguments(data_files=[str(args.corpus)]))
    rows = pack(texts, tokenizer, SEQUENCE_LENGTH, separate_documents=False)
    rows = rows.map(lambda batch: {"labels": batch["input_ids"]}, batched=True)
    model = new_model(tokenizer, args.num_hidden_layers, args.hidden_size)
    print(f"{model.num_parameters():,} parameters, {len(rows) * SEQUENCE_LENGTH:,} tokens to train on, in {precision}")

    def trainer(model: LlamaForCausalLM, folder: str | Path, max_steps: int, **options) -> SafeTrainer:
        training_args = TrainingArguments(
            output_dir=str(folder),
            max_steps=max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,  # of all steps
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=precision == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            logging_steps=200,
            save_total_limit=1,
            report_to="none",
            **options,
        )
        data = {"train_dataset": rows, "data_collator": default_data_collator}  # all rows are full
        return SafeTrainer(model=model, args=training_args, processing_class=tokenizer, **data)

    max_steps = args.max_steps
    if args.minutes is not None:
        with TemporaryDirectory() as folder:
            probe = trainer(copy.deepcopy(model), folder, 8, save_strategy="no", disable_tqdm=True)
            seconds = seconds_per_step(probe)
        max_steps = begun["max_steps"] if begun else steps_within(args.minutes, seconds, args.max_steps)
        checkpoint = latest_checkpoint(args.output_dir)
        left = max_steps - (int(checkpoint.rpartition("-")[2]) if checkpoint else 0)
        print(
            f"A step takes {seconds:.2f} seconds here, {left} steps {spoken(left * seconds)}; "
            "stop with Ctrl-C and go on with the same command."
        )
    facts = {"corpus": str(args.corpus), "learning_rate": args.learning_rate, "max_steps": max_steps}
    facts |= {"precision": precision, "versions": versions(), "machine": machine()}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_provenance(args.output_dir, facts)
    training = trainer(model, args.output_dir, max_steps)
    sizes = {"num_hidden_layers": args.num_hidden_layers, "hidden_size": args.hidden_size}
    made_of = sizes | {
        "corpus": of_files([str(args.corpus)]),
        "tokenizer": args.tokenizer and of_model(args.tokenizer),
    }
    training.run = open_run(args.output_dir, training_settings(training.args, **made_of))
    training.add_callback(TimedSaves(minutes=0.5))
    training.train(resume_from_checkpoint=True)
    training.save_model()
    write_provenance(args.output_dir, facts)  # of these weights
    training.save_state()
    speculator = {"config": "recipes/quickstart/stage1.yaml", "base_model": args.output_dir, "data_files": args.corpus}
    then = {"a speculator for it, stage 1": command_of("train_speculator.py", **speculator)}
    say_end(f"{args.output_dir}, the model; log.jsonl there", then=then)


def parse_args() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--corpus", type=Path, required=True, metavar="FILE", help="jsonl with `text`, to train on")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="FOLDER", help="of the trained model")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER_OR_ID", help="that of the model to draft for (default: a new one is trained)"
    )
    parser.add_argument("--max_steps", type=positive, default=3200, metavar="STEPS", help="of the training, at most")
    # Two rows of 256 tokens: of so few tokens in all, many small steps make the better model.
    parser.add_argument("--batch_size", type=positive, default=2, metavar="ROWS", help="of 256 tokens, in a step")
    parser.add_argument(
        "--minutes", type=positive_number, metavar="MINUTES", help="fewer steps where they take longer (default: all)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fast", help="fast: whichever is, on this machine")
    parser.add_argument("--learning_rate", type=positive_number, default=2e-3, metavar="RATE", help="at its peak")
    # Deep and narrow, as large models are beside their speculators: with few layers a host's overhead decides.
    parser.add_argument("--num_hidden_layers", type=positive, default=10, metavar="LAYERS", help="of the model")
    parser.add_argument("--hidden_size", type=positive, default=192, metavar="WIDTH", help="of the model")
    return parser.parse_args()


def new_model(tokenizer, num_hidden_layers: int, hidden_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 21 // 8,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=hidden_size // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def train_tokenizer(corpus: Path, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level pairs, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = {"special_tokens": [END_OF_TEXT], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    texts = (json.loads(line)["text"] for line in open(corpus))
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, **options))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


if __name__ == "__main__":
    run(main, FROM_CHECKPOINT)
