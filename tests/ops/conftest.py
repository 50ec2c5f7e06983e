"""Shared by the tests of the ops."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
