# Every target creates its virtual environment when it is missing; a machine needs Python 3.11+ and make alone.
PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS      ?= kernels,recipes,dev
WORKERS     ?= 2
# WHEEL=1 installs the built wheel instead of the working tree (CI tests what a user would install).
WHEEL       ?=
OUT         ?= out/quickstart
ARGS        ?=
BIN         := $(VENV)/bin
CONSTRAIN   := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.DEFAULT_GOAL := help
.PHONY: help setup check format test test-slow test-gpu test-engines mutants bench quickstart docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed  ## create .venv and install everything (CONSTRAINTS= lets pip choose, e.g. CUDA torch)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(WHEEL),)
	$(BIN)/python -m pip install -q $(CONSTRAIN) -e ".[$(EXTRAS)]"
else
	rm -rf build/wheel && $(BIN)/python -m pip wheel -q --no-deps -w build/wheel .
	$(BIN)/python -m pip install -q $(CONSTRAIN) "$$(ls build/wheel/*.whl)[$(EXTRAS)]"
endif
	touch $@

check: setup  ## ruff, mypy --strict for tw_core and tw_kernels, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup  ## the default suite (CPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --jaxtyping-packages=tw_core,beartype.beartype tests/core

test-slow: setup  ## the heavy CPU cases
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow --timeout=1800 $(ARGS)

test-gpu: setup  ## the cases that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

mutants: setup  ## seeded mistakes in the kernels, each of which the tests must catch
	$(BIN)/python -m tests.kernels.mutants

bench: setup  ## the CPU benchmarks; figures go to benchmarks/results/
	$(BIN)/python -m pytest benchmarks -q -m "" $(ARGS)

quickstart: setup  ## data, training, fork/join decoding and a table of results on a CPU
	$(BIN)/threadweaver quickstart --out $(OUT) $(ARGS)

docs: setup  ## fail when a table in README or docs differs from benchmarks/results/ (FIX=1 rewrites them)
	$(BIN)/python tools/tables.py $(if $(FIX),--fix)

clean:  ## remove what the targets made
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .benchmarks
