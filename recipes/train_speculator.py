"""Trains a speculator, stage 1 or 2, from a recipe.

python recipes/train_speculator.py --config recipes/quickstart/stage1.yaml [--key value ...]
accelerate launch recipes/train_speculator.py --config recipes/quickstart/stage2.yaml
"""

import sys

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, set_seed

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.trainers import (
    DistillationTrainer,
    ModelArguments,
    SpeculatorTrainer,
    latest_checkpoint,
    load_texts,
    pack,
    parse_recipe,
    split,
)


def main() -> None:
    model_args, data_args, args = parse_recipe(sys.argv[1:])
    set_seed(args.seed)

    base_model = AutoModelForCausalLM.from_pretrained(
        model_args.base_model, revision=model_args.base_model_revision, dtype=model_args.base_model_dtype
    )
    tokenizer = AutoTokenizer.from_pretrained(model_args.base_model, revision=model_args.base_model_revision)
    speculator = load_or_create_speculator(model_args, base_model)

    texts = load_texts(data_args.dataset, data_args.data_files, data_args.dataset_config, data_args.dataset_split)
    length = data_args.sequence_length if args.stage == 1 else data_args.prompt_length
    with args.main_process_first(desc="tokenizing"):
        rows = pack(texts, tokenizer, length, data_args.text_column)
    train_rows, validation_rows = split(rows, data_args.validation_fraction)

    trainer_class, options = SpeculatorTrainer, {}
    if args.stage == 2:
        trainer_class, options = DistillationTrainer, {"generation_length": data_args.generation_length}
    trainer = trainer_class(
        model=speculator,
        base_model=base_model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        **options,
    )
    checkpoint = args.resume_from_checkpoint
    if checkpoint in (None, "True", "true"):  # to go on from the newest is what a second run does anyway
        checkpoint = latest_checkpoint(args.output_dir)
    if checkpoint:
        print(f"Resuming from {checkpoint}.")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    if validation_rows is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_state()


def load_or_create_speculator(model_args: ModelArguments, base_model) -> MLPSpeculatorPreTrainedModel:
    """The speculator to train, in float32: the optimizer's updates are lost in half precision."""
    given = {
        key: getattr(model_args, key)
        for key in ("n_predict", "inner_dim", "top_k_tokens_per_head", "n_candidates")
        if getattr(model_args, key) is not None
    }
    if model_args.speculator is not None:
        if given:
            raise ValueError(
                f"{sorted(given)} describe a new speculator, but `speculator: {model_args.speculator}` starts from "
                "one that has its own. Drop them, or drop `speculator`."
            )
        return AutoModel.from_pretrained(model_args.speculator, dtype=torch.float32)
    config = base_model.config.get_text_config(decoder=True)
    return MLPSpeculatorPreTrainedModel(
        MLPSpeculatorConfig(
            vocab_size=config.vocab_size,
            emb_dim=config.hidden_size,
            base_model_name_or_path=model_args.base_model,
            **given,
        )
    )


if __name__ == "__main__":
    main()
