# Each target works on a fresh machine with nothing but Python >= 3.11: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test lint bench bench-gpu clean

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

# Models of 7 B to 20 B parameters with random weights: a GPU of 80 GB or more, an hour; BENCH="--targets llama2-7b".
bench-gpu: install
	$(BIN)/python recipes/benchmark_gpu.py --output recipes/results/gpu.json $(BENCH)

clean:
	rm -rf $(VENV) outputs
