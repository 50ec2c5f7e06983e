"""Builds the CUDA sources as C++, with `launch.cuh` of this folder: `python tests/emulated_cuda/build.py FOLDER`.

The module is `_native_cuda`, and its ops are those of CPU tensors.
"""

import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
DEFINITIONS = [
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DTORCH_STABLE_ONLY",
    "-DPy_LIMITED_API=0x030A0000",
]


def build(folder: Path) -> Path:
    """Return the path of the module that it built in `folder`."""
    sources = folder / "csrc"
    shutil.rmtree(sources, ignore_errors=True)
    shutil.copytree(CSRC, sources)
    shutil.copy(HERE / "launch.cuh", sources / "cuda")
    includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]

    def compiled(source: Path) -> Path:
        text = source.read_text(encoding="utf-8")
        copy = source.with_suffix(".cpp")
        copy.write_text(
            text.replace("(softprompt, CUDA, library)", "(softprompt, CPU, library)"), encoding="utf-8"
        )
        target = source.with_suffix(".o")
        run("c++", *FLAGS, *DEFINITIONS, *includes, "-c", str(copy), "-o", str(target))
        return target

    parts = sorted([*(sources / "cuda").glob("*.cu"), sources / "cuda" / "module.cpp"])
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, parts))
    module = folder / "_native_cuda.abi3.so"
    libraries = [f"-L{path}" for path in library_paths()]
    run(
        "c++",
        "-shared",
        "-pthread",
        *map(str, objects),
        *libraries,
        "-lc10",
        "-ltorch",
        "-ltorch_cpu",
        "-o",
        str(module),
    )
    return module


def run(*command: str) -> None:
    """Run a compiler; what it has to say is the message of the error."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
