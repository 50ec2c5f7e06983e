"""Runs the tests of the native ops under the compiler's address and undefined-behaviour sanitizers: those of
the CPU, and the CUDA sources on emulated blocks. From the root: `python tests/native/sanitize.py`.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from native_build import build

FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
FLAGS += ["-fno-sanitize-recover=undefined"]


def library_of(name: str) -> str:
    """The path of a run-time library of the compiler."""
    found = subprocess.run(["c++", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def main() -> int:
    """Returns the exit code of the first tests that failed, else 0."""
    for kind in ("cpu", "cuda"):
        with tempfile.TemporaryDirectory() as folder:
            environment = {
                **os.environ,
                "LD_PRELOAD": f"{library_of('libasan.so')} {library_of('libubsan.so')}",
                "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
                "UBSAN_OPTIONS": "print_stacktrace=1",
                "SOFTPROMPT_TEST_NATIVE": str(build(kind, Path(folder), FLAGS)),
            }
            tests = [sys.executable, "-m", "pytest", "-q", "-k", "native", "tests/ops"]
            code = subprocess.run(tests, env=environment).returncode
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
