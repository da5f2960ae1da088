"""Trainings of both stages, by any number of processes: run as a script by a launcher, or called by a test.

torchrun --standalone --nproc_per_node 2 tests/trainings.py FOLDER [NAME ...]
"""

import json
import sys
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from tiny_models import VOCAB, tiny_model

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.trainers import DistillationTrainer, SpeculatorTrainer, SpeculatorTrainingArguments


ROWS = 4  # of a step, over all processes
TRAININGS = {
    "stage 1": {},
    "stage 2": {"stage": 2},
    "documents": {"documents": True},
    "stream": {"stream": True},
    "sharded base model": {"shard_base_model": True, "loss": ["forward_kl", "cross_entropy"]},
    "sharded base model, stage 2": {"stage": 2, "shard_base_model": True},
    "written before": {"stage": 2, "written": True},
    "tied": {"tied": True},
}
BF16 = {"bf16": True}


def speculator(n_predict=3, **kwargs):
    torch.manual_seed(0)
    kwargs = {"vocab_size": VOCAB, "emb_dim": 32, "inner_dim": 16, "n_candidates": 3} | kwargs
    config = MLPSpeculatorConfig(n_predict=n_predict, **kwargs)
    return MLPSpeculatorPreTrainedModel(config)


def rows(n, length, documents=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = {"input_ids": torch.randint(VOCAB, (n, length), generator=generator).tolist()}
    if documents:  # that begin anywhere
        cuts = torch.randint(1, length, (n,), generator=generator).tolist()
        columns["position_ids"] = [[*range(cut), *range(length - cut)] for cut in cuts]
    return datasets.Dataset.from_dict(columns)


def arguments(tmp_path, **kwargs):
    defaults = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return SpeculatorTrainingArguments(**defaults | kwargs)


def train(folder, processes, stage=1, documents=False, stream=False, written=False, tied=False, **options):
    """A training of 4 steps; what must not depend on the number of processes."""
    train_rows = rows(32, 12, documents)
    if stream:
        train_rows = train_rows.to_iterable_dataset()
    if processes == 1:
        options.pop("shard_base_model", None)
    base_model = tiny_model("llama")
    base_model.generation_config.eos_token_id = [3, 4, 5, 6]  # so that some rows end early
    args = SpeculatorTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=4,
        per_device_train_batch_size=ROWS // processes,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        num_processes=processes,
        evaluation_prompts=5,
        **options,
    )
    trainer = (SpeculatorTrainer if stage == 1 else DistillationTrainer)(
        model=speculator(tie_weights=tied),
        base_model=base_model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=rows(7, 12, documents, seed=1),
        prompt_length=6,
        generation_length=9,
    )
    if written:
        trainer.write_continuations(str(folder / "written"))
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    kept = ("loss", "accuracy", "eval_loss", "eval_accuracy", "eval_tokens_per_step")
    logs = trainer.state.log_history + [metrics]
    return [{key: value for key, value in log.items() if key.startswith(kept)} for log in logs]


def main() -> None:
    folder, *names = sys.argv[1:]
    state = PartialState(cpu=True)
    for name in names or TRAININGS:
        logs = train(Path(folder) / name, state.num_processes, **TRAININGS.get(name, BF16))
        if state.is_main_process:
            (Path(folder) / name / "logs.json").write_text(json.dumps(logs))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
