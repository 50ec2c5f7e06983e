# Every target makes its own virtual environment (.venv) when there is none; PYTHON and VENV can be set from outside.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test test-slow test-all check tiny-model bench gpu gpu-tests gpu-steps gpu-kernels gpu-profile gpu-report gpu-device extension sanitize sanitize-cpu installs models compat peft-suite kills robustness gpu-rehearsal clean

help:
	@echo "make demo        train a soft prompt on the shipped model with PEFT and with softprompt, side by side"
	@echo "make test        the tests, but for the long ones; make test-all: all; make test-slow: the long ones"
	@echo "make check       ruff, formatting, mypy"
	@echo "make tiny-model  pretrain the shipped model again (minutes)"
	@echo "make bench       CPU benchmarks, then the tables and pictures of the README"
	@echo "make gpu         on a GPU: tests, benchmarks of steps and kernels, then their tables (about 8 minutes);"
	@echo "                 its parts: gpu-tests gpu-steps gpu-kernels gpu-report, and gpu-profile"
	@echo "make sanitize    on a GPU: every kernel once under compute-sanitizer"
	@echo "make sanitize-cpu   the tests of the native ops under address and undefined-behaviour sanitizers"
	@echo "make models      the tests of all architectures, and the table of docs/models.md"
	@echo "make compat      the tests of all architectures and commands with the oldest and the newest torch, transformers, peft"
	@echo "make peft-suite PEFT_SOURCE=FOLDER   PEFT's own prompt-tuning tests, against patched models"
	@echo "make kills       50 training runs killed in a save, and resumed (about 5 minutes)"
	@echo "make robustness  2,000 random batches against PEFT, 2,000 steps without growth (about 10 minutes)"
	@echo "make installs       installations into fresh environments: no compiler, no torch, editable, ..."
	@echo "make gpu-rehearsal  the same as make gpu at toy sizes on the CPU"

# Without build isolation, so that the native ops find torch; without a compiler they are left out, with a warning.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
$(READY): pyproject.toml constraints.txt setup.py $(wildcard csrc/*.h csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch 'setuptools>=77' ninja
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/softprompt demo

# The tests in two halves: those to run while working, and the long ones (compilers, processes of torchrun, emulated
# CUDA, rehearsals, kills).
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow --durations=20

test-all: test test-slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tiny-model: $(READY)
	$(BIN)/python -m benchmarks.tiny_model.generate
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.tiny_model.pretrain

bench: $(READY)
	$(BIN)/python -m benchmarks run --suite cpu
	$(BIN)/python -m benchmarks report

# PYTHON_BIN=python3 uses an interpreter that has everything, and makes no virtual environment.
ifdef PYTHON_BIN
GPU_READY =
else
PYTHON_BIN = $(BIN)/python
GPU_READY = $(READY)
endif
# Where records go; the report reads those of the repository, too.
OUT ?= benchmarks/results
GPU_BUDGET ?= 240
KERNEL_BUDGET ?= 90
REHEARSAL = build/rehearsal
GPU_TESTS ?= tests/gpu tests/ops tests/engine/test_host_reads.py
# The tests wait for the compiler most of the time, one process on each second core.
GPU_WORKERS ?= $(shell expr \( $$(nproc) + 1 \) / 2)
IN_PARALLEL = $$($(PYTHON_BIN) -c 'import importlib.util as u; print("-n $(GPU_WORKERS)" if u.find_spec("xdist") else "")')
GPU_TEST_SECONDS ?= 240
# What records name where there is no repository.
COMMIT ?= $(shell git rev-parse --short=10 HEAD 2>/dev/null)
RUN = $(PYTHON_BIN) -m benchmarks run --output $(OUT) $(if $(COMMIT),--commit $(COMMIT))
# NEEDS= looks for nothing and builds nothing: the ops are there, or those of Triton will do.
NEEDS ?= gpu-device extension

# Everything is run even where a check fails, and the table comes last; then the exit code says so.
GPU_PARTS ?= extension gpu-tests gpu-steps gpu-kernels gpu-report
gpu: gpu-device
	@failed=0; \
	for part in $(GPU_PARTS); do $(MAKE) --no-print-directory NEEDS= $$part || failed=1; done; \
	exit $$failed

# Without one the tests would be skipped, and kernels be measured on the CPU.
gpu-device: $(GPU_READY)
	@$(PYTHON_BIN) -c "import sys, torch; torch.cuda.is_available() or sys.exit(\
		f'torch {torch.__version__} sees no CUDA device; make gpu-rehearsal does the same at toy sizes without one')"

# One by one, where time is lent in pieces: a record is written after each case, so that a run that is stopped leaves
# some. GPU_CASES and KERNEL_CASES run a part of the cases, with the compiled peers for which a whole pass has no time.
gpu-tests: $(GPU_READY) $(NEEDS)
	timeout -s INT -k 20 $(GPU_TEST_SECONDS) $(PYTHON_BIN) -m pytest -q --tb=short -m gpu $(IN_PARALLEL) $(GPU_TESTS)

gpu-steps: $(GPU_READY) $(NEEDS)
	$(RUN) $(if $(GPU_CASES),--cases $(GPU_CASES),--suite gpu) --budget $(GPU_BUDGET)

gpu-kernels: $(GPU_READY) $(NEEDS)
	$(RUN) $(if $(KERNEL_CASES),--cases $(KERNEL_CASES),--suite kernels) --budget $(KERNEL_BUDGET)

PROFILES ?= gpu-article math 8b
gpu-profile: $(GPU_READY) $(NEEDS)
	$(RUN) --profile $(PROFILES)

gpu-report: $(GPU_READY)
	@failed=0; \
	$(PYTHON_BIN) -m benchmarks report --results $(sort benchmarks/results $(OUT)) || failed=1; \
	$(PYTHON_BIN) -m benchmarks short $(OUT) || failed=1; \
	exit $$failed

extension: $(GPU_READY)
	@mkdir -p build
	SOFTPROMPT_NATIVE=require $(PYTHON_BIN) setup.py --quiet build_ext --inplace >build/extension.log || { cat build/extension.log; exit 1; }

# The native ops of the CPU, and the CUDA sources on emulated blocks, under the compilers' checkers.
SANITIZED = build/sanitized
SANITIZER_FLAGS = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize-cpu: $(READY)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	for kind in cpu cuda; do \
		$(BIN)/python tests/native/native_build.py $$kind $(SANITIZED) $(SANITIZER_FLAGS) && \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1 \
		SOFTPROMPT_TEST_NATIVE=$(SANITIZED)/_native_$$kind.abi3.so \
		$(BIN)/python -m pytest -q -k native tests/ops || exit 1; \
	done

# Installations into fresh environments, whatever is missing there.
installs: $(READY)
	$(BIN)/python -m pytest -q -o addopts="--import-mode=importlib -ra" tests/install

# Kernels under NVIDIA's checkers; torch's allocator is off, so that every tensor has its own bounds. Only
# softprompt's kernels are looked at, since those of PyTorch would take minutes. SANITIZED_TESTS="tests/ops tests/gpu"
# checks them at more sizes, and takes long.
SANITIZED_TESTS ?= tests/gpu/test_every_kernel.py
SANITIZED_KERNELS = softprompt|attention_|_prompt|_pack_layout|_rows_loss|_partial_sums|_of_shares|_reduce_losses
SANITIZERS ?= memcheck racecheck
sanitize: export PYTORCH_NO_CUDA_MEMORY_CACHING = 1
sanitize: $(GPU_READY) $(NEEDS)
	@failed=0; \
	for tool in $(SANITIZERS); do \
		compute-sanitizer --tool $$tool --kernel-name "regex=$(SANITIZED_KERNELS)" --error-exitcode 9 \
			$$(test $$tool = memcheck && echo --report-api-errors no) \
			$(PYTHON_BIN) -m pytest -v --tb=short -m gpu $(SANITIZED_TESTS) || failed=1; \
	done; \
	exit $$failed

# The table of docs/models.md, from the tests of all architectures.
models: export SOFTPROMPT_RECORD_MODELS = build/models.jsonl
models: $(READY)
	mkdir -p build && rm -f $(SOFTPROMPT_RECORD_MODELS)
	$(BIN)/python -m pytest -q -n 2 tests/models
	$(BIN)/python tests/models/page.py $(SOFTPROMPT_RECORD_MODELS) docs/models.md

# Each environment downloads its own torch: minutes and gigabytes. ENVIRONMENTS="oldest newest" chooses.
compat: $(READY)
	$(BIN)/python tests/compat/run.py $(ENVIRONMENTS)

peft-suite: $(READY)
	$(BIN)/python tests/peft_suite/run.py $(PEFT_SOURCE)

kills: $(READY)
	$(BIN)/python tests/robustness/kill_saves.py --kills 50 --torn 14 --record tests/robustness/kill_saves.json

robustness: $(READY)
	$(BIN)/python tests/robustness/fuzz.py --batches 2000 --record benchmarks/results/robustness/fuzz.json
	$(BIN)/python tests/robustness/soak.py --steps 2000 --record benchmarks/results/robustness/soak.json

# What `make gpu` does, at toy sizes on the CPU: Triton's interpreter, and steps recorded by running them again.
gpu-rehearsal: export TRITON_INTERPRET = 1
gpu-rehearsal: export CUDA_VISIBLE_DEVICES =
gpu-rehearsal: $(GPU_READY) extension
	rm -rf $(REHEARSAL)
	mkdir -p $(REHEARSAL)
	cp README.md docs/benchmarks.md $(REHEARSAL)
	$(PYTHON_BIN) -m benchmarks run --suite gpu --tiny --threads 1 --rounds 1 --output $(REHEARSAL)
	$(PYTHON_BIN) -m benchmarks run --suite kernels --tiny --threads 1 --rounds 1 --output $(REHEARSAL)
	$(PYTHON_BIN) -m benchmarks run --profile gpu-article math --tiny --threads 1 --output $(REHEARSAL)
	$(PYTHON_BIN) -m benchmarks tune --tiny --most 2 --cases attention-8b-both --output $(REHEARSAL)
	$(PYTHON_BIN) -m benchmarks report --results $(REHEARSAL) --readme $(REHEARSAL)/README.md \
		--docs $(REHEARSAL)/benchmarks.md
	$(PYTHON_BIN) -m benchmarks short $(REHEARSAL)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
