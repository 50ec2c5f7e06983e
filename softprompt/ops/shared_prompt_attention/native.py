"""`shared_prompt_attention` compiled for the CPU: csrc/cpu/attention.*, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt.ops.registry import INSTRUCTIONS, declare
from softprompt.ops.shared_prompt_attention.layout import Attended, AttentionLayout, AttentionOptions


def forward(
    query: Tensor,  # [Hq, T, D], fp32 or fp64 as all others
    key: Tensor,  # [Hkv, T, D]
    value: Tensor,  # [Hkv, T, Dv]
    sinks: Tensor | None,  # [Hq]
    layout: AttentionLayout,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """The output [Hq, T, Dv], a token's heads side by side, and the log-sum-exp [Hq, T]."""
    heads, rows, _ = query.shape
    out = query.new_empty(rows, heads, value.shape[2])
    lse = query.new_empty(heads, rows)
    given = _prepared(query, sinks, layout, options)
    _FORWARD(_dense(query), _dense(key), _dense(value), *given, out, lse, INSTRUCTIONS["best"])
    return out.transpose(0, 1), lse


def backward(
    grad_out: Tensor,  # [Hq, T, Dv]
    saved: Attended,
    layout: AttentionLayout,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d(query), d(key), d(value), and d(sinks), which is empty where there are none."""
    query, key, value, sinks, out, lse = saved
    grads = [t.new_empty(t.shape[1], t.shape[0], t.shape[2]) for t in (query, key, value)]
    delta = torch.empty_like(lse)
    dense = [_dense(tensor) for tensor in (grad_out, query, key, value, out)]
    given = _prepared(query, sinks, layout, options)
    _BACKWARD(*dense, lse.contiguous(), *given, *grads, delta, INSTRUCTIONS["best"])
    of_sinks = lse.new_empty(0)
    if sinks is not None:
        of_sinks = -((sinks[:, None] - lse).exp() * delta).sum(1)
    grad_query, grad_key, grad_value = (grad.transpose(0, 1) for grad in grads)
    return grad_query, grad_key, grad_value, of_sinks


def _dense(heads: Tensor) -> Tensor:
    return heads if heads.stride(2) == 1 else heads.contiguous()


def _prepared(
    query: Tensor, sinks: Tensor | None, layout: AttentionLayout, options: AttentionOptions
) -> tuple[Any, ...]:
    """The layout's vectors and the options, as the compiled code wants them."""
    slopes, branches = options.alibi_slopes, layout.branches
    return (
        layout.query_position.int().contiguous(),
        layout.position_ids.int().contiguous(),
        layout.key_position.int().contiguous(),
        layout.cu_prompts.int().contiguous(),
        layout.cu_texts.int().contiguous(),
        layout.prompt_of_row.long().contiguous(),
        options.scale,
        options.sliding_window,
        options.softcap,
        None if slopes is None else slopes.to(query.dtype).contiguous(),
        None if sinks is None else sinks.contiguous(),
        None if branches is None else branches.contiguous().int(),
    )


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
