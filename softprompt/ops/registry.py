"""One `torch.library` namespace for all ops, and the choice of a back end for each call.

The schemas are declared here, in Python, so that `torch.ops.softprompt.*`, `torch.library.opcheck` and
`torch.compile(fullgraph=True)` work on every machine, whatever back ends it has.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

AUTO = "auto"
BACKENDS = ("reference", "triton", "native")
# What "auto" takes, the first that is there. On a CPU by measurement (docs/benchmarks.md); on a GPU the
# compiled kernels were not measured yet, and Triton comes with every CUDA build of torch.
PREFERRED = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}
BUILD_COMMAND = "pip install --no-build-isolation ."
_NATIVE_MODULES = {"cpu": "softprompt._native_cpu", "cuda": "softprompt._native_cuda"}
_NATIVE_INTERFACE = 3  # SOFTPROMPT_INTERFACE in csrc/tensors.h
# Numbers of csrc/cpu/lanes.h: of the compiled ops that are there for several sets of instructions.
INSTRUCTIONS = {"best": 0, "baseline": 1, "avx2": 2, "avx512": 3}
_LIBRARY = torch.library.Library("softprompt", "DEF")


@dataclass(frozen=True)
class Availability:
    """Whether a back end can serve tensors of a device, and a sentence that says why (not)."""

    usable: bool
    reason: str


def define(
    schema: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Any:
    """Declares `softprompt::<schema>` and returns the callable op `torch.ops.softprompt.<name>.default`.

    With `fake` the op is opaque to autograd and to the compiler: `kernel` serves every device, `fake` gives
    the shapes, and `backward`/`setup_context` (see `torch.library.register_autograd`) the gradient. Without
    `fake` the kernel is a composition of differentiable PyTorch ops and is traced through.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if fake is None:
        _LIBRARY.impl(name, kernel, "CompositeImplicitAutograd")
    else:
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"softprompt::{name}", fake, lib=_LIBRARY)
        if backward is not None:
            torch.library.register_autograd(
                f"softprompt::{name}", backward, setup_context=setup_context, lib=_LIBRARY
            )
    return getattr(torch.ops.softprompt, name).default


def declare(schema: str) -> Any:
    """Declares `softprompt::<schema>` and returns the callable op; a compiled module implements it."""
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.softprompt, schema.split("(", 1)[0]).default


@functools.cache
def triton_availability(device_type: str) -> Availability:
    """Whether the Triton kernels can serve tensors of `device_type` ("cpu", "cuda")."""
    if importlib.util.find_spec("triton") is None:
        return Availability(False, "triton is not installed (pip install triton)")
    if device_type == "cuda":
        return Availability(True, "triton is installed and the tensors are on a GPU")
    import triton

    if device_type == "cpu" and triton.knobs.runtime.interpret:
        return Availability(True, "TRITON_INTERPRET=1: the interpreter runs the kernels on CPU tensors")
    return Availability(
        False, f"Triton needs CUDA tensors, or TRITON_INTERPRET=1 for the CPU; got {device_type}"
    )


@functools.cache
def native_availability(device_type: str) -> Availability:
    """Whether the compiled ops can serve tensors of `device_type` ("cpu", "cuda")."""
    if device_type not in _NATIVE_MODULES:
        return Availability(False, f"there are no native ops for {device_type} tensors")
    name = _NATIVE_MODULES[device_type]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return Availability(False, f"the native ops for {device_type} are not built ({BUILD_COMMAND})")
    except ImportError as error:
        return Availability(False, f"{name} does not load: {error} (build it again: {BUILD_COMMAND})")
    built_as = getattr(module, "INTERFACE", None)
    if built_as != _NATIVE_INTERFACE:
        return Availability(
            False,
            f"{name} was built from other sources (interface {built_as}, expected {_NATIVE_INTERFACE}; "
            f"build it again: {BUILD_COMMAND})",
        )
    return Availability(True, f"{name} is built")


def availability(backend: str, device_type: str) -> Availability:
    """Whether "reference", "triton" or "native" can serve tensors of `device_type`."""
    if backend == "triton":
        return triton_availability(device_type)
    if backend == "native":
        return native_availability(device_type)
    return Availability(True, "PyTorch, on every device")


def choose_backend(op: str, backend: str, device: torch.device) -> str:
    """The back end that serves this call.

    Args:
        op: name of the op, for the error message.
        backend: "auto" or the name of one back end.
        device: device of the tensors.

    Raises:
        ValueError: an unknown back end, or one that cannot serve `device`.
    """
    if backend == AUTO:
        wanted = PREFERRED.get(device.type, ("reference",))
        return next(name for name in wanted if availability(name, device.type).usable)
    if backend not in BACKENDS:
        known = ", ".join(sorted((AUTO, *BACKENDS)))
        raise ValueError(f"{op}: unknown backend {backend!r}, expected one of {known}")
    found = availability(backend, device.type)
    if not found.usable:
        raise ValueError(f"{op}: backend={backend!r} cannot be used: {found.reason}")
    return backend


def check_indices(name: str, indices: torch.Tensor, size: int) -> None:
    """Raises IndexError for an entry of a CPU tensor outside 0 .. size - 1; on a GPU nothing is read."""
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    values = indices.numpy()  # the same memory; PyTorch has no minimum of the larger unsigned numbers
    outside = (values < 0) | (values >= size)
    if outside.any():
        place = int(outside.argmax())
        raise IndexError(f"{name}[{place}] is {values[place]}, expected 0 .. {size - 1}")


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless all given tensors are on one device."""
    devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {listing}")
