"""`shared_prompt_attention` compiled for the CPU: csrc/cpu/attention.*, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from softprompt.ops.registry import INSTRUCTIONS, declare, define
from softprompt.ops.shared_prompt_attention.gradient import no_second_derivative
from softprompt.ops.shared_prompt_attention.layout import AttentionLayout

_HALF = (torch.float16, torch.bfloat16)
_PLAIN = (Tensor, Parameter)


def shared_prompt_attention(
    query: Tensor,  # [Hq, T, D]
    key: Tensor,  # [Hkv, T, D]
    value: Tensor,  # [Hkv, T, Dv]
    layout: AttentionLayout,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,  # [Hq]
    sinks: Tensor | None,  # [Hq]
) -> Tensor:
    dtype = value.dtype
    if dtype in _HALF:
        query, key, value = query.float(), key.float(), value.float()
    # The op costs 80 us more a call than the function, and only tracing needs it.
    attend = _Attention.apply if type(query) in _PLAIN else _OP
    out, _ = attend(
        query,
        key,
        value,
        layout.query_position,
        layout.position_ids,
        layout.key_position,
        layout.cu_prompts,
        layout.cu_texts,
        layout.prompt_of_row,
        scale,
        sliding_window,
        softcap,
        None if alibi_slopes is None else alibi_slopes.to(query.dtype),
        None if sinks is None else sinks.to(query.dtype),
        layout.branches,
    )
    return out.to(dtype)


def _rows_first(like: Tensor, width: int | None = None) -> Tensor:
    """[T, heads, width] for the result of a tensor of [heads, T, ...]."""
    heads, rows, own = like.shape
    return like.new_empty(rows, heads, own if width is None else width)


def _dense(heads: Tensor) -> Tensor:
    return heads if heads.stride(2) == 1 else heads.contiguous()


def _prepared(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The layout's vectors and the options, as the compiled code wants them."""
    *vectors, prompt_of_row, scale, window, softcap, slopes, sinks, branches = arguments
    vectors = [vector.int().contiguous() for vector in vectors]
    slopes, sinks, branches = (None if one is None else one.contiguous() for one in (slopes, sinks, branches))
    branches = None if branches is None else branches.int()
    return *vectors, prompt_of_row.long().contiguous(), scale, window, softcap, slopes, sinks, branches


def _kernel(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out = _rows_first(query, value.shape[2])
    lse = query.new_empty(query.shape[:2])
    _FORWARD(_dense(query), _dense(key), _dense(value), *_prepared(arguments), out, lse, INSTRUCTIONS["best"])
    return out.transpose(0, 1), lse


def _fake(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _rows_first(query, value.shape[2]).transpose(0, 1), query.new_empty(query.shape[:2])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *vectors = inputs[:9]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.options = inputs[9:12]
    ctx.save_for_backward(query, key, value, *output, *vectors, *inputs[12:])


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 15
    query, key, value, out, lse, *vectors, slopes, sinks, branches = ctx.saved_tensors
    # Only the op tells autograd that its results depend on the inputs: differentiated again, it raises. And
    # only an op can be run for each of the gradients of `is_grads_batched=True`.
    direct = type(query) in _PLAIN and not torch.is_grad_enabled()
    direct = direct and not torch._C._functorch.is_legacy_batchedtensor(grad_out)
    gradient = _backward_kernel if direct else _GRADIENT
    grads = gradient(grad_out, query, key, value, out, lse, *vectors, *ctx.options, slopes, sinks, branches)
    return *grads[:3], *(None,) * 10, None if sinks is None else grads[3], None


def _backward_kernel(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [_rows_first(tensor) for tensor in (query, key, value)]
    delta = torch.empty_like(lse)
    _BACKWARD(
        _dense(grad_out),
        _dense(query),
        _dense(key),
        _dense(value),
        _dense(out),
        lse.contiguous(),
        *_prepared(arguments),
        *grads,
        delta,
        INSTRUCTIONS["best"],
    )
    sinks = arguments[10]
    of_sinks = lse.new_empty(0)
    if sinks is not None:
        of_sinks = -((sinks[:, None] - lse).exp() * delta).sum(1)
    grad_query, grad_key, grad_value = (grad.transpose(0, 1) for grad in grads)
    return grad_query, grad_key, grad_value, of_sinks


def _backward_fake(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    sinks = arguments[10]
    return (
        *(_rows_first(tensor).transpose(0, 1) for tensor in (query, key, value)),
        lse.new_empty(0) if sinks is None else torch.empty_like(sinks),
    )


class _Attention(torch.autograd.Function):
    """The same without `torch.library` around it."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = _kernel(*arguments)
        _setup(ctx, arguments, (out, lse))
        return out, lse

    backward = staticmethod(_backward)


_ARGUMENTS = (
    "Tensor query_position, Tensor position_ids, Tensor key_position, Tensor cu_prompts, Tensor cu_texts,"
    " Tensor prompt_of_row, float scale, int? sliding_window, float? softcap, Tensor? alibi_slopes,"
    " Tensor? sinks, Tensor? branches"
)
_FORWARD = declare(
    f"native_shared_prompt_attention(Tensor query, Tensor key, Tensor value, {_ARGUMENTS},"
    " Tensor(a!) out, Tensor(b!) lse, int instructions) -> ()"
)
_BACKWARD = declare(
    "native_shared_prompt_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value,"
    f" Tensor out, Tensor lse, {_ARGUMENTS}, Tensor(a!) grad_query, Tensor(b!) grad_key,"
    " Tensor(c!) grad_value, Tensor(d!) delta, int instructions) -> ()"
)
_GRADIENT = define(
    "shared_prompt_attention_native_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value,"
    f" Tensor out, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    fake=_backward_fake,
    backward=no_second_derivative,
)
_OP = define(
    f"shared_prompt_attention_native(Tensor query, Tensor key, Tensor value, {_ARGUMENTS})"
    " -> (Tensor, Tensor)",
    _kernel,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)
