"""`glu`: the gated linear unit of an MLP, `activation(gate) * up` (Shazeer 2020).

Compiled in csrc/cpu/elementwise.cpp, in Triton in `triton_elementwise.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from softprompt.ops.checks import check_floating, check_same_device, check_shape_of
from softprompt.ops.registry import (
    AUTO,
    INSTRUCTIONS,
    KERNELS,
    Backends,
    declare,
    define_filled,
    differentiable_once,
    eager,
)
from softprompt.ops.rms_norm import as_rows, dense

__all__ = ["ACTIVATIONS", "glu"]

# SiLU, which is also called swish, and GELU by tanh. Their numbers stand in csrc/cpu/elementwise.h too.
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


def glu(
    gate: Tensor,  # [..., I]
    up: Tensor,  # [..., I]
    *,
    activation: str,
    backend: str = AUTO,
) -> Tensor:
    """`activation(gate) * up`, computed in fp32 (fp64 for fp64) and rounded once.

    Args:
        gate: [..., I], fp16, bf16, fp32 or fp64.
        up: [..., I] in the dtype of gate.
        activation: "silu" (SwiGLU) or "gelu_tanh" (GEGLU).
        backend: "auto", "reference", "triton" or "native" (CPU).

    Returns:
        [..., I] in the dtype of gate, differentiable once in gate and up.

    Raises:
        ValueError: gate and up of different shapes, dtypes or devices, an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    check_floating(gate=gate, up=up)
    check_shape_of("gate", gate.shape, up=up)
    if gate.ndim == 0 or gate.dtype != up.dtype:
        raise ValueError(f"gate and up must be [..., I] of one dtype, got {gate.dtype} and {up.dtype}")
    check_same_device("glu", gate=gate, up=up)
    run = _OP if torch.compiler.is_compiling() else _EAGER
    rows: Tensor = run(as_rows(gate), as_rows(up), ACTIVATIONS[activation], backend)
    return rows.view(gate.shape)


class GateGradients(NamedTuple):
    """Of a gated linear unit."""

    gate: Tensor  # [N, I]
    up: Tensor  # [N, I]


def _activated(gate: Tensor, activation: int) -> Tensor:
    return functional.silu(gate) if activation == 0 else functional.gelu(gate, approximate="tanh")


def reference(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    """The op in plain PyTorch."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (_activated(gate.to(wide), activation) * up.to(wide)).to(gate.dtype)


def reference_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: int) -> GateGradients:
    """The gradients of gate and up."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    given, gates, ups = grad.to(wide), gate.to(wide), up.to(wide)
    if activation == 0:
        d_gate = torch.ops.aten.silu_backward(given * ups, gates)
    else:
        d_gate = torch.ops.aten.gelu_backward(given * ups, gates, approximate="tanh")
    return GateGradients(d_gate.to(gate.dtype), (given * _activated(gates, activation)).to(gate.dtype))


def _allocate(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    return gate.new_empty(gate.shape)


def _allocate_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: int) -> GateGradients:
    return GateGradients(gate.new_empty(gate.shape), gate.new_empty(gate.shape))


def _setup_context(ctx: Any, inputs: list[Any], output: Tensor) -> None:
    gate, up, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor | None]:
    d_gate, d_up = _GRADIENT(grad, *ctx.saved_tensors, ctx.activation, ctx.backend)
    return {"gate": d_gate, "up": d_up}


def _native(gate: Tensor, up: Tensor, activation: int, out: Tensor) -> None:
    _NATIVE(dense(gate), dense(up), activation, out, INSTRUCTIONS["best"])


def _native_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: int, d_gate: Tensor, d_up: Tensor
) -> None:
    _NATIVE_BACKWARD(dense(grad), dense(gate), dense(up), activation, d_gate, d_up, INSTRUCTIONS["best"])


_NATIVE = declare(
    "native_glu(Tensor gate, Tensor up, int activation, Tensor(a!) out, int instructions) -> ()"
)
_NATIVE_BACKWARD = declare(
    "native_glu_backward(Tensor grad, Tensor gate, Tensor up, int activation, Tensor(a!) d_gate,"
    " Tensor(b!) d_up, int instructions) -> ()"
)
_TRITON = "softprompt.ops.triton_elementwise:"
_AUTOGRAD: dict[str, Any] = {"backward": _backward, "setup_context": _setup_context}
_OP = define_filled(
    "glu", Backends("glu", reference, _native, _TRITON + "glu", ("cpu",)), _allocate, **_AUTOGRAD
)
_EAGER = eager(_OP, KERNELS[_OP], **_AUTOGRAD)
_BACKWARD_OP = define_filled(
    "glu_backward",
    Backends("glu", reference_backward, _native_backward, _TRITON + "glu_backward", ("cpu",)),
    _allocate_backward,
    backward=differentiable_once("glu"),
)
_GRADIENT = eager(_BACKWARD_OP, KERNELS[_BACKWARD_OP])
