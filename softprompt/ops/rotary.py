"""`rotary`: rotary position embeddings (Su et al. 2021) of queries and keys in one pass.

Compiled in csrc/cpu/elementwise.cpp, in Triton in `triton_elementwise.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from softprompt.ops.checks import check_floating, check_frozen, check_same_device
from softprompt.ops.registry import AUTO, INSTRUCTIONS, KERNELS, Backends, declare, define_filled, eager
from softprompt.ops.rms_norm import dense

__all__ = ["rotary"]


def rotary(
    query: Tensor,  # [Hq, N, D]
    key: Tensor,  # [Hkv, N, D]
    cos: Tensor,  # [N, R]
    sin: Tensor,  # [N, R]
    *,
    interleaved: bool = False,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """`x * cos + rotate(x) * sin` of the first R numbers of each head, computed in fp32 (fp64 for fp64).

    Number i is paired with number i + R/2, or, interleaved, number 2i with number 2i + 1; `rotate` puts
    `(-second, first)` in place of a pair. The other D - R numbers stay as they are.

    Args:
        query: [Hq, N, D], fp16, bf16, fp32 or fp64; fastest where a token's heads stand together in memory.
        key: [Hkv, N, D] in the dtype of query.
        cos: [N, R] with an even R of at most D, in any floating dtype. It gets no gradient, nor does sin.
        sin: [N, R].
        interleaved: which numbers are a pair.
        backend: "auto", "reference", "triton" or "native" (CPU).

    Returns:
        Query and key as given, a token's heads side by side in memory; differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; cos or sin that want a gradient.
    """
    check_floating(query=query, key=key, cos=cos, sin=sin)
    if query.ndim != 3 or key.ndim != 3 or query.shape[1:] != key.shape[1:] or query.dtype != key.dtype:
        raise ValueError(
            "query and key must be [heads, N, D] of one dtype, "
            f"got {list(query.shape)} in {query.dtype} and {list(key.shape)} in {key.dtype}"
        )
    rotated = cos.shape[-1]
    if cos.shape != (query.shape[1], rotated) or sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise ValueError(
            f"cos and sin must be [N, R] of one dtype with N = {query.shape[1]}, "
            f"got {list(cos.shape)} in {cos.dtype} and {list(sin.shape)} in {sin.dtype}"
        )
    if rotated % 2 or rotated > query.shape[2]:
        raise ValueError(f"R must be even and at most D = {query.shape[2]}, got {rotated}")
    check_frozen(cos=cos, sin=sin)
    check_same_device("rotary", query=query, key=key, cos=cos, sin=sin)
    run = _OP if torch.compiler.is_compiling() else _EAGER
    out = run(query.transpose(0, 1), key.transpose(0, 1), cos, sin, interleaved, False, backend)
    return out[0].transpose(0, 1), out[1].transpose(0, 1)


class Rotated(NamedTuple):
    """Heads by token."""

    query: Tensor  # [N, Hq, D]
    key: Tensor  # [N, Hkv, D]


def _rotate(x: Tensor, interleaved: bool, transposed: bool, sin: Tensor) -> Tensor:
    """`rotate(x) * sin`, or with `transposed` its gradient `-rotate(x * sin)`."""
    if transposed:
        x = -x * sin
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    return turned if transposed else turned * sin


def reference(
    query: Tensor,  # [N, Hq, D]
    key: Tensor,  # [N, Hkv, D]
    cos: Tensor,  # [N, R]
    sin: Tensor,  # [N, R]
    interleaved: bool,
    transposed: bool,
) -> Rotated:
    """The op in plain PyTorch."""
    wide = torch.promote_types(query.dtype, torch.float32)
    cosine, sine = cos.to(wide)[:, None], sin.to(wide)[:, None]

    def turned(x: Tensor) -> Tensor:
        part = x[..., : cos.shape[1]].to(wide)
        result = part * cosine + _rotate(part, interleaved, transposed, sine)
        return torch.cat((result.to(x.dtype), x[..., cos.shape[1] :]), -1)

    return Rotated(turned(query), turned(key))


def _allocate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool
) -> Rotated:
    return Rotated(query.new_empty(query.shape), key.new_empty(key.shape))


def _setup_context(ctx: Any, inputs: list[Any], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.interleaved, ctx.transposed, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, query: Tensor, key: Tensor) -> dict[str, Tensor | None]:
    d_query, d_key = _EAGER(query, key, *ctx.saved_tensors, ctx.interleaved, not ctx.transposed, ctx.backend)
    return {"query": d_query, "key": d_key}


def _native(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    transposed: bool,
    out_query: Tensor,
    out_key: Tensor,
) -> None:
    given = map(dense, (query, key, cos, sin))
    _NATIVE(*given, interleaved, transposed, out_query, out_key, INSTRUCTIONS["best"])


_NATIVE = declare(
    "native_rotary(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved, bool transposed,"
    " Tensor(a!) out_query, Tensor(b!) out_key, int instructions) -> ()"
)
_AUTOGRAD: dict[str, Any] = {"backward": _backward, "setup_context": _setup_context}
_OP = define_filled(
    "rotary",
    Backends("rotary", reference, _native, "softprompt.ops.triton_elementwise:rotary", ("cpu",)),
    _allocate,
    **_AUTOGRAD,
)
_EAGER = eager(_OP, KERNELS[_OP], **_AUTOGRAD)
