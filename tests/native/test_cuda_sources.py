"""The CUDA sources without a GPU: they compile, and their kernels pass the tests of the ops."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

import build

SOURCES = sorted((build.CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_source_compiles_for_three_generations_without_a_warning_or_a_spill(source, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    done = subprocess.run(
        [
            "nvcc",
            *(
                "-std=c++20",
                "-O3",
                "--expt-relaxed-constexpr",
                "-DUSE_CUDA",
                *build.DEFINITIONS[:2],
                *targets,
            ),
            *("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Werror,-Wno-unknown-pragmas", "-Xptxas", "-v"),
            *(f"-I{path}" for path in include_paths()),
            *("-c", str(source), "-o", str(tmp_path / "object.o")),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    spills = [line.strip() for line in done.stderr.splitlines() if "spill stores" in line]
    assert len(spills) >= len(ARCHITECTURES)
    assert {line.split(",")[1].strip() for line in spills} == {"0 bytes spill stores"}


@pytest.mark.slow
def test_the_kernels_pass_the_tests_of_the_ops_on_emulated_blocks(tmp_path):
    if shutil.which("c++") is None or sys.platform != "linux":
        pytest.skip("the emulation needs a C++ compiler on Linux")
    module = build.build("cuda", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "native and not host_reads", "tests/ops"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "SOFTPROMPT_TEST_NATIVE": str(module)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = int(done.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed > 150
