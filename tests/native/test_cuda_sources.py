"""The CUDA sources without a GPU: they compile, and their kernels pass the tests of the ops."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import native_build
import pytest
from torch.utils.cpp_extension import include_paths

SOURCES = sorted((native_build.CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100)
REGISTERS = 65_536  # of a multiprocessor; a block that needs more is not launched
SPILLED_BYTES = 8  # of a thread: ptxas spills a register where one more block fits without it
THREADS = {"packILb0": 1024, "rows_loss_and_gradient": 512}  # of the largest block; 128 of all other kernels


def registers_of_blocks(report):
    """Each kernel in what ptxas reports, with its architecture, and the registers of its largest block."""
    for kernel, text in re.findall(
        r"Compiling entry function ('\S+' for '\S+')(.*?)(?=Compiling|\Z)", report, re.S
    ):
        threads = next((number for part, number in THREADS.items() if part in kernel), 128)
        of_warp = int(re.search(r"Used (\d+) registers", text)[1]) * 32
        yield kernel, -(-of_warp // 256) * 256 * threads // 32  # a warp gets them in units of 256


@pytest.mark.slow(seconds=35)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_source_compiles_for_three_generations_without_a_warning_and_its_blocks_fit(source, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    done = subprocess.run(
        [
            # The oldest C++ that a supported torch builds extensions as.
            *("nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr"),
            *("-DUSE_CUDA", *native_build.DEFINITIONS[:2], *targets),
            *("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Werror,-Wno-unknown-pragmas", "-Xptxas", "-v"),
            *(f"-I{path}" for path in include_paths()),
            *("-c", str(source), "-o", str(tmp_path / "object.o")),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    assert len(spills) >= len(ARCHITECTURES)
    assert max(spills) <= SPILLED_BYTES
    blocks = dict(registers_of_blocks(done.stderr))
    assert len(blocks) == len(spills)
    assert {kernel: size for kernel, size in blocks.items() if size > REGISTERS} == {}


@pytest.mark.slow(seconds=110)
def test_the_kernels_pass_the_tests_of_the_ops_on_emulated_blocks(tmp_path):
    if shutil.which("c++") is None or sys.platform != "linux":
        pytest.skip("the emulation needs a C++ compiler on Linux")
    module = native_build.build("cuda", tmp_path)
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
