"""rms_norm, glu and rotary with their gradients, against what transformers writes out: bound by memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels.problem import (
    KernelVariant,
    Outputs,
    Problem,
    backend_variants,
    compiled,
    dtype_of,
)
from softprompt.ops.glu import glu
from softprompt.ops.rms_norm import rms_norm
from softprompt.ops.rotary import rotary

_EPS = 1e-5
Function = Callable[..., Outputs]


@dataclass(frozen=True)
class RowsOf:
    """Rows of hidden states, or of an MLP."""

    rows: int  # N
    width: int  # H or I
    activation: str = "silu"


@dataclass(frozen=True)
class HeadsOf:
    """Queries and keys of one layer."""

    tokens: int  # N
    num_heads: int  # Hq
    num_key_heads: int  # Hkv
    head_dim: int  # D, all of which is rotated


def norm(sizes: RowsOf, device: str) -> Problem:
    """`rms_norm`, and LlamaRMSNorm."""
    (x,), weight = _numbers(device, (sizes.rows, sizes.width)), _numbers(device, (sizes.width,))[0]

    def plain(x: Tensor) -> Outputs:
        wide = x if x.dtype == torch.float64 else x.float()
        normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)
        return (weight.to(x.dtype) * normalised.to(x.dtype),)

    def own(backend: str) -> Function:
        return lambda x: (rms_norm(x, weight, eps=_EPS, backend=backend),)

    # Forward: x and the result. Backward: the gradient, x and the gradient of x.
    return _problem(own, plain, [x], 5 * x.numel())


def gate(sizes: RowsOf, device: str) -> Problem:
    """`glu`, and the activation and the product of LlamaMLP or GemmaMLP."""
    inputs = _numbers(device, *2 * [(sizes.rows, sizes.width)])

    def plain(gates: Tensor, ups: Tensor) -> Outputs:
        if sizes.activation == "silu":
            return (functional.silu(gates) * ups,)
        return (functional.gelu(gates, approximate="tanh") * ups,)

    def own(backend: str) -> Function:
        return lambda gates, ups: (glu(gates, ups, activation=sizes.activation, backend=backend),)

    # Forward: gate, up and the result. Backward: the gradient, gate, up and their gradients.
    return _problem(own, plain, inputs, 8 * inputs[0].numel())


def rotation(sizes: HeadsOf, device: str) -> Problem:
    """`rotary`, and `apply_rotary_pos_emb` of Llama, on heads as projections leave them."""
    query, key = (
        heads.transpose(0, 1)
        for heads in _numbers(
            device,
            (sizes.tokens, sizes.num_heads, sizes.head_dim),
            (sizes.tokens, sizes.num_key_heads, sizes.head_dim),
        )
    )
    angles = torch.arange(sizes.tokens, device=device)[:, None] * 1e4 ** torch.linspace(
        0, -1, sizes.head_dim // 2, device=device
    )
    angles = torch.cat([angles, angles], 1)
    cos, sin = angles.cos().to(query.dtype), angles.sin().to(query.dtype)

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        rotated = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * cos.to(x.dtype) + rotated * sin.to(x.dtype)

    def plain(query: Tensor, key: Tensor) -> Outputs:
        return turned(query), turned(key)

    def own(backend: str) -> Function:
        return lambda query, key: rotary(query, key, cos, sin, backend=backend)

    # Forward and backward read and write queries and keys, and read cosines and sines.
    numbers = query.numel() + key.numel() + cos.numel()
    return _problem(own, plain, [query, key], 4 * numbers)


def _numbers(device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, device=device, dtype=dtype_of(device)) for shape in shapes]


def _problem(
    own: Callable[[str], Function], plain: Function, inputs: Sequence[Tensor], moved_numbers: int
) -> Problem:
    """Forward and gradients of an op, by back end, and of PyTorch's own ops, as they are and compiled."""
    outputs = plain(*inputs)
    grads = [torch.randn_like(out) for out in outputs]

    def both(function: Function, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Outputs:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        outputs = function(*leaves)
        return *(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, grads)

    def truth() -> Outputs:
        return both(plain, [tensor.double() for tensor in inputs], [grad.double() for grad in grads])

    def compile_plain() -> Callable[[], Outputs]:
        function = compiled(plain)
        return lambda: both(function, inputs, grads)

    variants = (
        *backend_variants(
            lambda backend: both(own(backend), inputs, grads),
            ("triton", "native", "reference"),
            optional=("reference",),
        ),
        KernelVariant("plain torch", lambda: lambda: both(plain, inputs, grads)),
        KernelVariant("plain torch+compile", compile_plain, optional=True, compiles=True),
    )
    tolerance = 1e-2 if inputs[0].dtype == torch.bfloat16 else 1e-5
    return Problem(
        variants,
        truth,
        (tolerance,) * (len(outputs) + len(inputs)),
        0,
        moved_numbers * inputs[0].element_size(),
    )
