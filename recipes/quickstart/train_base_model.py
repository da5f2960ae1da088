"""Trains a tokenizer and a small Llama on the source code of this interpreter's standard library.

python recipes/quickstart/train_base_model.py --output_dir outputs/quickstart

Writes corpus/train.jsonl, corpus/held_out.jsonl (files that no training sees) and base_model/.
"""

import argparse
import json
import sysconfig
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from modeling_speculator.trainers import latest_checkpoint, load_texts, pack


END_OF_TEXT = "<|endoftext|>"
# Folders of the standard library that are tests, or that other packages are installed into.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "pydoc_data"}
HELD_OUT_EVERY = 20  # files: prompts come from these


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=700)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--bs", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    set_seed(0)
    corpus = write_corpus(args.output_dir / "corpus")
    tokenizer = train_tokenizer(corpus, args.vocab_size)
    rows = pack(load_texts(data_files=[str(corpus)]), tokenizer, sequence_length=args.seq)
    print(f"{len(rows)} rows")
    rows = rows.map(lambda batch: {"labels": batch["input_ids"]}, batched=True)

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 8 // 3 // 32 * 32,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 32,
            num_key_value_heads=args.hidden // 64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    print(f"{model.num_parameters():,} parameters")
    run = str(args.output_dir / "base_model_training")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=run,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.bs,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=50,
            save_steps=200,
            save_total_limit=1,
            report_to="none",
        ),
        train_dataset=rows,
    )
    trainer.train(resume_from_checkpoint=latest_checkpoint(run))
    model.save_pretrained(args.output_dir / "base_model")
    tokenizer.save_pretrained(args.output_dir / "base_model")


def write_corpus(folder: Path) -> Path:
    """Splits the standard library's files into two jsonl files; returns the one to train on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.jsonl", "w") as train, open(folder / "held_out.jsonl", "w") as held_out:
        for index, path in enumerate(paths):
            file = held_out if index % HELD_OUT_EVERY == 0 else train
            text = path.read_text(encoding="utf-8", errors="ignore")
            file.write(json.dumps({"file": str(path.relative_to(root)), "text": text}) + "\n")
    return folder / "train.jsonl"


def train_tokenizer(corpus: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = ByteLevelBPETokenizer()
    texts = (json.loads(line)["text"] for line in open(corpus))
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


if __name__ == "__main__":
    main()
