"""The Triton kernels of `shared_prompt_attention` as an op; Triton is imported at the first call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt.ops.registry import define
from softprompt.ops.shared_prompt_attention.gradient import no_second_derivative


def _triton_kernel(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from softprompt.ops.shared_prompt_attention.triton import forward

    layout, options = arguments[:9], arguments[10:]
    return forward(query, *layout, *options)


def _triton_fake(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    heads, rows, _ = query.shape
    out = value.new_empty(rows, heads, value.shape[2]).transpose(0, 1)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_empty(heads, rows, dtype=wide)


def _triton_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *layout = inputs[:10]
    ctx.set_materialize_grads(False)
    ctx.options = inputs[10:14]
    ctx.save_for_backward(query, key, value, *output, *layout, *inputs[14:16])


def _triton_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    none = (None,) * 16
    if grad_out is None:
        return none
    query, key, value, out, lse, *layout, alibi_slopes, sinks = ctx.saved_tensors
    query_grad, key_grad, value_grad, sinks_grad = _TRITON_BACKWARD(
        grad_out, query, key, value, out, lse, *layout, *ctx.options, alibi_slopes, sinks
    )
    return query_grad, key_grad, value_grad, *none[:12], None if sinks is None else sinks_grad


def _triton_backward_kernel(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from softprompt.ops.shared_prompt_attention.triton import backward

    return backward(grad_out, *arguments)


def _triton_backward_fake(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    def rows_first(like: Tensor) -> Tensor:
        heads, rows, width = like.shape
        return like.new_empty(rows, heads, width).transpose(0, 1)

    sinks = arguments[-1]
    return (
        *(rows_first(tensor) for tensor in (query, key, value)),
        lse.new_empty(0) if sinks is None else torch.empty_like(sinks),
    )


_LAYOUT_SCHEMA = (
    "Tensor query_position, Tensor position_ids, Tensor key_position, Tensor segments, Tensor prefix_id,"
    " Tensor cu_prompts,"
    " Tensor cu_texts, SymInt prompt_tokens, float scale, int? sliding_window, float? softcap,"
    " Tensor? alibi_slopes, Tensor? sinks"
)
_TRITON_BACKWARD = define(
    "shared_prompt_attention_triton_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value,"
    f" Tensor out, Tensor lse, {_LAYOUT_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    _triton_backward_kernel,
    fake=_triton_backward_fake,
    backward=no_second_derivative,
)
TRITON = define(
    f"shared_prompt_attention_triton(Tensor query, Tensor key, Tensor value, {_LAYOUT_SCHEMA})"
    " -> (Tensor, Tensor)",
    _triton_kernel,
    fake=_triton_fake,
    backward=_triton_backward,
    setup_context=_triton_setup,
)
