"""The package is described in pyproject.toml; here are its native ops, which it can do without.

They are built where torch can be imported: `pip install --no-build-isolation .`. SOFTPROMPT_NATIVE says what
happens when that fails: `auto` warns and installs without them, `require` fails, `skip` does not try.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import setup

MODE = os.environ.get("SOFTPROMPT_NATIVE", "auto")
if MODE not in ("auto", "require", "skip"):
    raise SystemExit(f"SOFTPROMPT_NATIVE must be auto, require or skip, got {MODE!r}")
HOW_TO = (
    "To build them later: pip install torch 'setuptools>=77' ninja, then pip install --no-build-isolation "
    "--force-reinstall --no-deps . (softprompt doctor says what is missing)."
)


def without(what: str, error: BaseException) -> None:
    """Go on without `what`, or fail where it is required."""
    if MODE == "require":
        raise SystemExit(f"SOFTPROMPT_NATIVE=require: {what} cannot be built: {error}") from error
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    warnings.warn(f"softprompt is installed without {what} (optional): {reason}. {HOW_TO}", stacklevel=2)


def sources(folder: str, *patterns: str) -> list[str]:
    """Files below csrc, as paths relative to this file."""
    return sorted(str(path) for pattern in patterns for path in Path("csrc", folder).glob(pattern))


def name_cuda_home() -> None:
    """Set CUDA_HOME to what `nvcc` calls its home.

    torch takes the folder above that of `nvcc`, which holds no libraries where `nvcc` is a script or a link.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, flags=re.MULTILINE)
    if top is not None and Path(top[1]).is_dir():
        os.environ["CUDA_HOME"] = str(Path(top[1]).resolve())


def extensions() -> tuple[list, dict]:
    """The extension modules that can be tried here, and the command that builds them."""
    try:
        if sysconfig.get_config_var("Py_GIL_DISABLED"):
            raise ImportError("a free-threaded Python has no limited API")
        import torch

        if torch.version.cuda:
            name_cuda_home()
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except Exception as error:  # a torch that misses a library raises OSError
        without("its native ops", error)
        return [], {}

    class Build(BuildExtension):
        """Builds what can be built: an extension that fails does not take the installation with it."""

        def build_extensions(self) -> None:
            wanted, built = self.extensions, []
            for extension in wanted:
                self.extensions = [extension]
                try:
                    super().build_extensions()
                    built.append(extension)
                except (Exception, SystemExit) as error:
                    without(f"the native ops {extension.name}", error)
            self.extensions = built

    options = {
        "define_macros": [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("TORCH_STABLE_ONLY", None)],
        "depends": sources(".", "*.h", "*/*.h"),
        "py_limited_api": True,
    }
    flags = ["/O2"]
    if sys.platform != "win32":
        flags = [
            "-O3",
            "-g0",
            "-fvisibility=hidden",
            "-fopenmp-simd",
            "-fno-math-errno",
            "-fno-trapping-math",
        ]
    flags += os.environ.get("SOFTPROMPT_CXX_FLAGS", "").split()
    cpu = sources("cpu", "*.cpp")
    found = [CppExtension("softprompt._native_cpu", cpu, extra_compile_args={"cxx": flags}, **options)]
    if torch.version.cuda and CUDA_HOME:
        knows_blackwell = tuple(int(part) for part in torch.version.cuda.split(".")[:2]) >= (12, 8)
        os.environ.setdefault(
            "TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX" if knows_blackwell else "8.0;9.0+PTX"
        )
        options["define_macros"] = [*options["define_macros"], ("USE_CUDA", None)]
        compile_args = {"cxx": flags, "nvcc": ["-O3", "-lineinfo"]}
        cuda = sources("cuda", "*.cu", "*.cpp")
        found.append(
            CUDAExtension("softprompt._native_cuda", cuda, extra_compile_args=compile_args, **options)
        )
    return found, {"build_ext": Build}


os.chdir(Path(__file__).resolve().parent)
modules, commands = ([], {}) if MODE == "skip" else extensions()
# One binary for all versions of Python.
options = {"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {}
setup(ext_modules=modules, cmdclass=commands, options=options)
