# Each target works on a fresh machine with nothing but Python >= 3.11: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test lint bench clean

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
	$(BIN)/python recipes/benchmark_step.py $(BENCH)

clean:
	rm -rf $(VENV) outputs
