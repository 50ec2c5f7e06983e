"""What a kernel case is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.rehearsal import compile_options

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class KernelTargets:
    """What softprompt's best back end has to reach; None: nothing is asked."""

    over_floor: float | None = None  # at most: time / floor
    microseconds: float | None = None  # at most
    vs: tuple[tuple[str, float], ...] = ()  # variant, or "every peer" -> at least: its time / time
    # A plain copy of as many bytes is a variant, too: at least 1 / 1.3 means within 1.3 times its time.


@dataclass(frozen=True)
class KernelCase:
    """An op at one size."""

    name: str
    op: str
    about: str
    build: Callable[[Any, str], Problem]  # of the sizes and a device
    sizes: Any
    toy: Any  # sizes of a rehearsal
    targets: KernelTargets = field(default_factory=KernelTargets)  # on a GPU
    cpu_targets: KernelTargets = field(default_factory=KernelTargets)

    def targets_on(self, kind: str) -> KernelTargets:
        """What is asked on a device of this kind, "cuda" or "cpu"."""
        return self.targets if kind == "cuda" else self.cpu_targets


@dataclass(frozen=True)
class KernelVariant:
    """One way to compute it. `make` prepares it and returns what is timed, or raises where it cannot."""

    name: str
    make: Callable[[], Callable[[], Outputs]]
    own: bool = False
    optional: bool = False  # not run where time is short
    compiles: bool = False
    comparable: Callable[[Outputs], Outputs] = lambda outputs: outputs  # in the form of the truth


@dataclass(frozen=True)
class Problem:
    """A case on a device."""

    variants: tuple[KernelVariant, ...]
    truth: Callable[[], Outputs]
    tolerances: tuple[float, ...]  # of each output: |out - truth| / |truth|; 0: equal
    flop: float
    moved_bytes: float


class NotAvailable(RuntimeError):
    """A variant cannot run here; says why."""


def backend_variants(
    call: Callable[[str], Outputs], backends: tuple[str, ...], *, optional: tuple[str, ...] = ()
) -> tuple[KernelVariant, ...]:
    """The back ends of an op; one that it does not know is not available.

    Args:
        call: runs the op on the back end of that name.
        backends: their names.
        optional: those of them that are not run where time is short.
    """

    def make(backend: str) -> Callable[[], Callable[[], Outputs]]:
        def made() -> Callable[[], Outputs]:
            try:
                call(backend)
            except ValueError as error:
                raise NotAvailable("not built" if backend == "native" else str(error)) from error
            return lambda: call(backend)

        return made

    return tuple(KernelVariant(name, make(name), own=True, optional=name in optional) for name in backends)


def compiled(function: Callable[..., Any], *, dynamic: bool | None = None) -> Callable[..., Any]:
    """`torch.compile` with what a rehearsal asks for."""
    return torch.compile(function, dynamic=dynamic, **compile_options())


def error_of(out: Tensor, truth: Tensor) -> float:
    """|out - truth| / |truth|; of integers the share of wrong ones. Infinite for another shape, or NaN."""
    if out.shape != truth.shape:
        return float("inf")
    if not truth.is_floating_point():
        return float((out.long() != truth.long()).double().mean()) if truth.numel() else 0.0
    norm = float(torch.linalg.vector_norm(truth.double()))
    off = float(torch.linalg.vector_norm(out.double() - truth.double()))
    error = off / norm if norm else off
    return error if error == error else float("inf")


def dtype_of(device: str) -> torch.dtype:
    """Of the suite: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device == "cuda" else torch.float32
