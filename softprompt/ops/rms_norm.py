"""`rms_norm`: root mean square normalisation of rows (Zhang and Sennrich 2019), with a frozen weight.

Compiled in csrc/cpu/elementwise.cpp, in Triton in `triton_elementwise.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softprompt.ops.checks import check_floating, check_frozen, check_same_device
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

__all__ = ["rms_norm"]


def rms_norm(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    *,
    eps: float,
    offset: float = 0.0,
    backend: str = AUTO,
) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + offset)`, computed in fp32 (fp64 for fp64) and rounded once.

    Args:
        x: [..., H], fp16, bf16, fp32 or fp64.
        weight: [H] in any floating dtype. It gets no gradient.
        eps: added to the mean of squares.
        offset: added to the weight: 1.0 where a model keeps its weight around 0 (Gemma).
        backend: "auto", "reference", "triton" or "native" (CPU).

    Returns:
        [..., H] in the dtype of x, differentiable once in x.

    Raises:
        ValueError: a weight of another width than x or that wants a gradient, other dtypes, another device.
    """
    check_floating(x=x, weight=weight)
    if weight.ndim != 1 or x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"weight must be [H] with H = {list(x.shape)[-1:]}, got {list(weight.shape)}")
    check_frozen(weight=weight)
    check_same_device("rms_norm", x=x, weight=weight)
    run = _OP if torch.compiler.is_compiling() else _EAGER
    rows: Tensor = run(as_rows(x), weight, eps, offset, backend)[0]
    return rows.view(x.shape)


def as_rows(x: Tensor) -> Tensor:
    """[..., H] as [N, H], in which N is known where H is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


class Normalised(NamedTuple):
    """Rows, and what each was multiplied with before the weight."""

    rows: Tensor  # [N, H]
    inverse: Tensor  # [N] fp32, or fp64 for fp64


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def reference(x: Tensor, weight: Tensor, eps: float, offset: float) -> Normalised:
    """The op in plain PyTorch."""
    wide = x.to(_wide(x.dtype))
    inverse = (wide.square().mean(1) + eps).rsqrt()
    return Normalised((wide * inverse[:, None] * (weight.to(wide.dtype) + offset)).to(x.dtype), inverse)


def reference_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float) -> Tensor:
    """[N, H]: the gradient of x."""
    factor = inverse[:, None]
    scaled = grad.to(factor.dtype) * (weight.to(factor.dtype) + offset)
    normalised = x.to(factor.dtype) * factor
    return ((scaled - normalised * (scaled * normalised).mean(1, keepdim=True)) * factor).to(x.dtype)


def _allocate(x: Tensor, weight: Tensor, eps: float, offset: float) -> Normalised:
    return Normalised(x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=_wide(x.dtype)))


def _allocate_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: list[Any], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.offset, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> dict[str, Tensor | None]:
    return {} if grad is None else {"x": _GRADIENT(grad, *ctx.saved_tensors, ctx.offset, ctx.backend)}


def _native(x: Tensor, weight: Tensor, eps: float, offset: float, rows: Tensor, inverse: Tensor) -> None:
    _NATIVE(dense(x), weight.contiguous(), eps, offset, rows, inverse, INSTRUCTIONS["best"])


def _native_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float, d_x: Tensor
) -> None:
    _NATIVE_BACKWARD(dense(grad), dense(x), weight.contiguous(), inverse, offset, d_x, INSTRUCTIONS["best"])


def dense(rows: Tensor) -> Tensor:
    """Rows whose numbers stand side by side."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


_NATIVE = declare(
    "native_rms_norm(Tensor x, Tensor weight, float eps, float offset, Tensor(a!) rows, Tensor(b!) inverse,"
    " int instructions) -> ()"
)
_NATIVE_BACKWARD = declare(
    "native_rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse, float offset,"
    " Tensor(a!) d_x, int instructions) -> ()"
)
_TRITON = "softprompt.ops.triton_elementwise:"
_AUTOGRAD: dict[str, Any] = {"backward": _backward, "setup_context": _setup_context}
_OP = define_filled(
    "rms_norm",
    Backends("rms_norm", reference, _native, _TRITON + "rms_norm", ("cpu",)),
    _allocate,
    **_AUTOGRAD,
)
_EAGER = eager(_OP, KERNELS[_OP], **_AUTOGRAD)
_BACKWARD_OP = define_filled(
    "rms_norm_backward",
    Backends("rms_norm", reference_backward, _native_backward, _TRITON + "rms_norm_backward", ("cpu",)),
    _allocate_backward,
    backward=differentiable_once("rms_norm"),
)
_GRADIENT = eager(_BACKWARD_OP, KERNELS[_BACKWARD_OP])
