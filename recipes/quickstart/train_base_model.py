"""Trains a small Llama on text, and a tokenizer, unless it is given one.

python recipes/quickstart/train_base_model.py --corpus corpus/train.jsonl --output_dir base_model
python recipes/quickstart/train_base_model.py --corpus corpus/train.jsonl --output_dir draft_model \\
    --tokenizer base_model --num_hidden_layers 1
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from modeling_speculator.trainers import DataArguments, SafeTrainer, load_texts, pack


END_OF_TEXT = "<|endoftext|>"
SEQUENCE_LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="jsonl with `text`")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tokenizer", help="folder or Hub id: that of the model to draft for")
    parser.add_argument("--max_steps", type=int, default=800)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    # Deep and narrow, as large models are beside their speculators: with few layers a host's overhead decides.
    parser.add_argument("--num_hidden_layers", type=int, default=10)
    parser.add_argument("--hidden_size", type=int, default=192)
    args = parser.parse_args()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else train_tokenizer(args.corpus)
    texts = load_texts(DataArguments(data_files=[str(args.corpus)]))
    rows = pack(texts, tokenizer, SEQUENCE_LENGTH, separate_documents=False)
    rows = rows.map(lambda batch: {"labels": batch["input_ids"]}, batched=True)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=args.hidden_size * 21 // 8,
            num_hidden_layers=args.num_hidden_layers,
            num_attention_heads=args.hidden_size // 32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    print(f"{model.num_parameters():,} parameters, {len(rows) * SEQUENCE_LENGTH:,} tokens to train on")
    trainer = SafeTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            per_device_train_batch_size=8,  # small: at so few tokens, more steps count for more
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=40,
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
        processing_class=tokenizer,
        data_collator=default_data_collator,  # all rows are full
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    trainer.save_state()


def train_tokenizer(corpus: Path, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    tokenizer = ByteLevelBPETokenizer()
    texts = (json.loads(line)["text"] for line in open(corpus))
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END_OF_TEXT])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


if __name__ == "__main__":
    main()
