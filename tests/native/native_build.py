"""Builds the native sources as a module of its own, for the tests:

    python tests/native/native_build.py {cpu,cuda} FOLDER [compiler flags]

"cuda" is compiled as C++ with `launch.cuh` of this folder instead of that of csrc/cuda: the kernels then run
on CPU tensors. The tests use the module instead of the installed one where SOFTPROMPT_TEST_NATIVE names it.
"""

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
DEFINITIONS = [
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DTORCH_STABLE_ONLY",
    "-DPy_LIMITED_API=0x030A0000",
]


def build(kind: str, folder: Path, flags: Sequence[str] = ()) -> Path:
    """Return the path of the module that it built in `folder` from the sources of a kind, "cpu" or "cuda"."""
    sources = folder / "csrc"
    shutil.rmtree(sources, ignore_errors=True)
    shutil.copytree(CSRC, sources)
    shutil.copy(HERE / "launch.cuh", sources / "cuda")
    includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]

    def compiled(source: Path) -> Path:
        text = source.read_text(encoding="utf-8").replace(
            "(softprompt, CUDA, library)", "(softprompt, CPU, library)"
        )
        copy = source.with_suffix(".cpp")
        copy.write_text(text, encoding="utf-8")
        target = source.with_suffix(".o")
        run("c++", *FLAGS, *flags, *DEFINITIONS, *includes, "-c", str(copy), "-o", str(target))
        return target

    parts = [path for path in (sources / kind).iterdir() if path.suffix in (".cpp", ".cu")]
    if kind == "cuda":  # what ops on CPU tensors take from the CPU's sources alone
        parts += [sources / "cpu" / name for name in ("few_rows.cpp", "attention.cpp", "elementwise.cpp")]
    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compiled, sorted(parts))]
    module = folder / f"_native_{kind}.abi3.so"
    libraries = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch", "-ltorch_cpu"]
    run("c++", "-shared", "-pthread", *flags, *objects, *libraries, "-o", str(module))
    return module


def run(*command: str) -> None:
    """Run a compiler; what it has to say is the message of the error."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":
    print(build(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
