# Each target works on a fresh machine with nothing but Python >= 3.11: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test lint bench bench-training bench-gpu head-to-head-gpu clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

quickstart: install
	$(BIN)/python recipes/quickstart.py

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# BENCH="--base_model DIR --speculator DIR" measures yours; the default is a random model of 36 M parameters.
bench: install
	$(BIN)/python recipes/benchmark_step.py --compile $(BENCH)

# What training costs beside its parts, and the memory of the loss at 128,256 tokens: ten minutes on a CPU.
bench-training: install
	$(BIN)/python recipes/benchmark_training.py $(BENCH)
	$(BIN)/python recipes/benchmark_loss.py

# Models of 7 B to 20 B parameters with random weights: a GPU of 80 GB or more, an hour; BENCH="--targets llama2-7b".
bench-gpu: install
	$(BIN)/python recipes/benchmark_gpu.py --output recipes/results/gpu.json $(BENCH)
	$(BIN)/python recipes/benchmark_training.py --target llama2-7b --device cuda --new_tokens 256 \
		--output recipes/results/training_gpu.json
	$(BIN)/python recipes/benchmark_loss.py --device cuda --positions 8192 32768 --inner_dim 3072 \
		--output recipes/results/loss_gpu.json

# Every drafter on a code model of 100 M parameters that is trained there: half an hour on a GPU.
# BENCH="--prompts HumanEval.jsonl.gz --prompt_length 16 32 64" measures on those.
head-to-head-gpu: install
	$(BIN)/python recipes/quickstart/write_corpus.py --output_dir outputs/gpu/corpus
	$(BIN)/python recipes/quickstart/train_base_model.py --corpus outputs/gpu/corpus/train.jsonl \
		--output_dir outputs/gpu/base_model --num_hidden_layers 14 --hidden_size 768 --learning_rate 6e-4 --max_steps 4000
	$(BIN)/python recipes/head_to_head.py --base_model outputs/gpu/base_model --corpus outputs/gpu/corpus \
		--output_dir outputs/gpu/head_to_head --inner_dim 1024 --dtype bfloat16 $(BENCH)

clean:
	rm -rf $(VENV) outputs
