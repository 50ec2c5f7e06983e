# Every target makes its own virtual environment (.venv) when there is none; PYTHON and VENV can be set from outside.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test check tiny-model bench gpu clean

help:
	@echo "make demo        train a soft prompt on the shipped model with PEFT and with softprompt, side by side"
	@echo "make test        all tests"
	@echo "make check       ruff, formatting, mypy"
	@echo "make tiny-model  pretrain the shipped model again (minutes)"
	@echo "make bench       CPU benchmarks, then the tables and pictures of the README"
	@echo "make gpu         the tests that need a CUDA device, with softprompt's kernels running natively"

$(READY): pyproject.toml constraints.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/softprompt demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tiny-model: $(READY)
	$(BIN)/python -m softprompt.tiny.generate
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m softprompt.tiny.pretrain

bench: $(READY)
	$(BIN)/python -m benchmarks run --suite cpu
	$(BIN)/python -m benchmarks report

gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
