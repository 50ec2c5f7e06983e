"""Shared by the tests of the ops."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from softprompt.ops.registry import INSTRUCTIONS, native_availability

ROOT = Path(__file__).parents[2]


@pytest.fixture
def compile_kernels(tmp_path):
    """Compiles kernels for GPUs in a process of its own; see `benchmarks/compile_kernels.py`."""

    def run(cases):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "TRITON_CACHE_DIR": str(tmp_path),
        }
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.compile_kernels"],
            cwd=ROOT,
            input=json.dumps(cases),
            capture_output=True,
            text=True,
            env=environment,
        )
        if done.returncode:
            pytest.fail(done.stderr)
        return json.loads(done.stdout)

    return run


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instruction_set(request, monkeypatch):
    """Holds the compiled ops that take the best instructions to one set of them."""
    if not native_availability("cpu").usable:
        pytest.skip("the native ops are not built")
    number, one = INSTRUCTIONS[request.param], torch.ones(1, 1)
    try:
        torch.ops.softprompt.native_few_rows_logits(one, one, torch.empty(1, 1), number)
    except RuntimeError as error:
        if "has no instructions" not in str(error):
            raise
        pytest.skip(f"no {request.param} here")
    monkeypatch.setitem(INSTRUCTIONS, "best", number)
