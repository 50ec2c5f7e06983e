"""What this installation can do: versions, devices, and the back ends of the ops with what they lack."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from softprompt import __version__
from softprompt.ops.registry import BACKENDS, BUILD_COMMAND, PREFERRED, availability

PACKAGE = "softprompt"
OPTIONAL = ("triton", "accelerate", "datasets", "matplotlib", "pandas", "rich", "ninja")
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis."""

    name: str
    state: str  # "ok", "missing" or "unusable"
    detail: str
    fix: str | None = None  # the command or the change that mends it


@dataclass(frozen=True)
class Diagnosis:
    """All lines, by part."""

    packages: tuple[Finding, ...]
    devices: tuple[Finding, ...]
    backends: dict[str, tuple[Finding, ...]]  # of each device type, in alphabetical order
    chosen: dict[str, str]  # device type -> the back end that "auto" takes
    build: tuple[Finding, ...]  # what building the native ops needs

    def usable(self, backend: str, device_type: str) -> bool:
        """Whether a back end serves tensors of a device."""
        return any(
            finding.name == backend and finding.state == "ok" for finding in self.backends[device_type]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, for JSON."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this Python, its packages, the devices that torch sees, and the back ends of the ops."""
    types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    backends = {kind: tuple(_backend(name, kind) for name in sorted(BACKENDS)) for kind in types}
    chosen = {
        kind: next(name for name in PREFERRED[kind] if availability(name, kind).usable) for kind in types
    }
    return Diagnosis((_python(), *_packages()), tuple(_devices()), backends, chosen, tuple(_build()))


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")


def _packages() -> list[Finding]:
    try:
        found = [Finding(PACKAGE, "ok", importlib.metadata.version(PACKAGE))]
        requirements = importlib.metadata.requires(PACKAGE) or ()
    except importlib.metadata.PackageNotFoundError:
        folder = Path(__file__).parents[1]
        found = [Finding(PACKAGE, "ok", f"{__version__}, not installed: used from {folder}")]
        requirements = _declared(folder / "pyproject.toml")
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None:
            found.append(_package(requirement))
    return found + [_package(Requirement(name), optional=True) for name in OPTIONAL]


def _declared(project: Path) -> list[str]:
    """What a project file asks for; nothing where there is none."""
    if not project.is_file():
        return []
    return list(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"])


def _package(requirement: Requirement, *, optional: bool = False) -> Finding:
    name = requirement.name
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            name, "missing", "optional" if optional else "required", f"pip install '{requirement}'"
        )
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(
            name, "unusable", f"{version}, expected {requirement.specifier}", f"pip install '{requirement}'"
        )
    return Finding(name, "ok", version)


def _devices() -> list[Finding]:
    threads = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    found = [Finding("cpu", "ok", f"{platform.machine()}, {threads}")]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            found.append(
                Finding(
                    f"cuda:{number}",
                    "ok",
                    f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                    f"{properties.total_memory / 2**30:.0f} GiB",
                )
            )
    elif torch.version.cuda is None:
        has_driver = _DRIVER.exists()
        found.append(
            Finding(
                "cuda",
                "unusable" if has_driver else "missing",
                f"torch {torch.__version__} is built without CUDA"
                + (", and there is an NVIDIA driver" if has_driver else ""),
                "install a CUDA build of torch (its web site has the command)" if has_driver else None,
            )
        )
    else:
        found.append(
            Finding("cuda", "missing", f"torch is built for CUDA {torch.version.cuda} and sees no GPU")
        )
    return found


def _backend(name: str, device_type: str) -> Finding:
    found = availability(name, device_type)
    if found.usable:
        return Finding(name, "ok", found.reason)
    return Finding(name, "unusable", found.reason, _fix_of(name, device_type))


def _fix_of(backend: str, device_type: str) -> str:
    if backend == "native":
        return f"{BUILD_COMMAND} (in a copy of the sources, after pip install 'setuptools>=77' ninja)"
    if device_type == "cpu":
        return "nothing: Triton is for GPUs; TRITON_INTERPRET=1 runs its kernels slowly, for tests"
    return "pip install triton"


def _build() -> list[Finding]:
    named = shlex.split(os.environ.get("CXX", ""))  # a command, maybe with arguments
    compiler = named[0] if named else next(filter(shutil.which, ("c++", "g++", "clang++", "cl")), None)
    found = [
        _tool("C++ compiler", compiler, "apt-get install g++, or xcode-select --install on a Mac"),
        _tool("ninja", "ninja", "pip install ninja"),
    ]
    if torch.version.cuda:
        found.append(_tool("nvcc", _nvcc(), f"install the CUDA toolkit {torch.version.cuda}"))
    return found


def _nvcc() -> str:
    """Where torch's builds look for it: CUDA_HOME or CUDA_PATH, PATH, /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is None and shutil.which("nvcc") is None:
        home = "/usr/local/cuda"
    return "nvcc" if home is None else str(Path(home, "bin", "nvcc"))


def _tool(name: str, command: str | None, fix: str) -> Finding:
    path = shutil.which(command) if command else None
    if path is None:
        return Finding(name, "missing", "only needed to build the native ops", fix)
    return Finding(name, "ok", path)
