"""One `torch.library` namespace for all ops, and the choice of a back end for each call.

The schemas are declared here, in Python, so that `torch.ops.softprompt.*`, `torch.library.opcheck` and
`torch.compile(fullgraph=True)` work on every machine, whatever back ends it has.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

AUTO = "auto"
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


def choose_backend(op: str, backend: str, device: torch.device, *, default: str = "reference") -> str:
    """The back end that serves this call.

    Args:
        op: name of the op, for the error message.
        backend: "auto" or the name of one back end.
        device: device of the tensors.
        default: what "auto" means where Triton is not the choice.

    Raises:
        ValueError: an unknown back end, or one that cannot serve `device`.
    """
    if backend == AUTO:
        return "triton" if device.type == "cuda" and triton_availability("cuda").usable else default
    if backend == "triton":
        availability = triton_availability(device.type)
        if not availability.usable:
            raise ValueError(f"{op}: backend='triton' cannot be used: {availability.reason}")
        return backend
    if backend in ("reference", default):
        return backend
    known = sorted({AUTO, "reference", "triton", default})
    raise ValueError(f"{op}: unknown backend {backend!r}, expected one of {', '.join(known)}")


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless all given tensors are on one device."""
    devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {listing}")
