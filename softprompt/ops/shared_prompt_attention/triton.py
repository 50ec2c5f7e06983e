"""`shared_prompt_attention` in Triton, in the manner of FlashAttention-2 (Dao 2023, arXiv:2307.08691).

A program owns a block of consecutive rows of the packed row, whatever texts they belong to: texts of 20
tokens share a block, and the grids follow from T alone, so that nothing of the layout has to be known by the
host and a captured launch serves every batch of its size. Where the keys of a block lie is read from the
layout's tensors on the device:

    a block's keys = [first prompt row seen .. last one seen] + [start of its first row's text .. itself]

Most blocks of a long text hold rows of that text only; they need no mask but on the diagonal ("uniform").

The backward recomputes the probabilities. d(key) and d(value) of a token come from its own text. Those of a
prompt come from all texts that see it, which are split over programs into fp32 partial sums that are then
added in a fixed order: deterministic, without atomics.

Scores are kept in units of log2, so that exp2 serves for exp.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt.ops.shared_prompt_attention.configs import LaunchConfig, launch_config, padded_dim
from softprompt.ops.shared_prompt_attention.triton_forward import attention_forward
from softprompt.ops.shared_prompt_attention.triton_key_grad import attention_backward_key
from softprompt.ops.shared_prompt_attention.triton_query_grad import attention_backward_query

_LOG2E = 1.4426950408889634
_SPLIT_ROWS = 512  # text rows for each partial sum of a prompt's gradient
_MAX_SPLITS = 32
_MAX_PROGRAMS = 4096  # more than any GPU holds at a time, so that splitting further gains nothing


def forward(
    query: Tensor,  # [Hq, T, D]
    key: Tensor,  # [Hkv, T, D]
    value: Tensor,  # [Hkv, T, Dv]
    query_position: Tensor,  # [T], as the next four
    position_ids: Tensor,
    key_position: Tensor,
    segments: Tensor,
    prefix_id: Tensor,
    cu_prompts: Tensor,  # [K + 1]
    cu_texts: Tensor,  # [B + 1]
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,  # [Hq]
    sinks: Tensor | None,  # [Hq]
) -> tuple[Tensor, Tensor]:
    """The output [Hq, T, Dv], a token's heads side by side, and the log-sum-exp [Hq, T] in units of log2."""
    dtype = value.dtype
    query, key, value = _readable(query), _readable(key), _readable(value)
    alibi_slopes, sinks = _dense(alibi_slopes), _dense(sinks)
    num_heads, num_rows, head_dim = query.shape
    value_dim = value.shape[2]
    out = torch.empty(num_rows, num_heads, value_dim, dtype=value.dtype, device=value.device).transpose(0, 1)
    lse = torch.empty(num_heads, num_rows, dtype=_accumulator(query)[0], device=query.device)
    config = launch_config("forward", max(head_dim, value_dim), query.element_size())
    with torch.cuda.device_of(query):
        attention_forward[(triton.cdiv(num_rows, config.queries), num_heads)](
            query,
            key,
            value,
            out,
            lse,
            alibi_slopes,
            sinks,
            query_position,
            position_ids,
            key_position,
            segments,
            prefix_id,
            cu_prompts,
            cu_texts,
            num_rows,
            cu_prompts.shape[0] - 1,
            cu_texts.shape[0] - 1,
            num_heads // key.shape[0],
            head_dim,
            value_dim,
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *out.stride()[:2],
            **_options(query, value_dim, scale, sliding_window, softcap, config),
        )
    return out.to(dtype), lse


def backward(
    grad_out: Tensor,  # [Hq, T, Dv]
    query: Tensor,  # [Hq, T, D]
    key: Tensor,  # [Hkv, T, D]
    value: Tensor,  # [Hkv, T, Dv]
    out: Tensor,  # [Hq, T, Dv]
    lse: Tensor,  # [Hq, T]
    query_position: Tensor,  # [T], as the next four
    position_ids: Tensor,
    key_position: Tensor,
    segments: Tensor,
    prefix_id: Tensor,
    cu_prompts: Tensor,  # [K + 1]
    cu_texts: Tensor,  # [B + 1]
    prompt_rows: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,  # [Hq]
    sinks: Tensor | None,  # [Hq]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d(query), d(key), d(value), and d(sinks), which is empty where there are none."""
    dtype = query.dtype
    grad_out, query, key, value, out = (_readable(t) for t in (grad_out, query, key, value, out))
    alibi_slopes = _dense(alibi_slopes)
    num_heads, num_rows, head_dim = query.shape
    num_key_heads, value_dim = key.shape[0], value.shape[2]
    width, itemsize = max(head_dim, value_dim), query.element_size()
    grads = [
        torch.empty(num_rows, t.shape[0], t.shape[2], dtype=t.dtype, device=t.device).transpose(0, 1)
        for t in (query, key, value)
    ]
    delta = torch.empty_like(lse)
    layout = (query_position, position_ids, key_position, segments, prefix_id, cu_prompts, cu_texts)
    counts = (cu_prompts.shape[0] - 1, cu_texts.shape[0] - 1, num_heads // num_key_heads)
    strides = (*query.stride(), *key.stride(), *value.stride())
    with torch.cuda.device_of(query):
        config = launch_config("query", width, itemsize)
        attention_backward_query[(triton.cdiv(num_rows, config.queries), num_heads)](
            query,
            key,
            value,
            out,
            grad_out,
            lse,
            delta,
            grads[0],
            alibi_slopes,
            *layout,
            num_rows,
            *counts,
            head_dim,
            value_dim,
            *strides,
            *out.stride()[:2],
            *grad_out.stride(),
            *grads[0].stride()[:2],
            **_options(query, value_dim, scale, sliding_window, softcap, config),
        )
        key_blocks = triton.cdiv(prompt_rows, launch_config("prompt", width, itemsize).keys)
        splits = splits_of(num_rows - prompt_rows, key_blocks * num_key_heads)
        partial = [lse.new_empty(splits, num_key_heads, prompt_rows, size) for size in (head_dim, value_dim)]
        for kind, key_rows in (("prompt", prompt_rows), ("key", num_rows)):
            config = launch_config(kind, width, itemsize)
            if kind == "prompt" and splits == 0:
                continue
            split_rows = triton.cdiv(triton.cdiv(num_rows - prompt_rows, max(splits, 1)), config.queries)
            grid = (triton.cdiv(key_rows, config.keys), splits if kind == "prompt" else 1, num_key_heads)
            attention_backward_key[grid](
                query,
                key,
                value,
                grad_out,
                lse,
                delta,
                grads[1],
                grads[2],
                *partial,
                alibi_slopes,
                *layout,
                num_rows,
                prompt_rows,
                *counts,
                splits,
                split_rows * config.queries,
                head_dim,
                value_dim,
                *strides,
                *grad_out.stride(),
                *grads[1].stride()[:2],
                *grads[2].stride()[:2],
                OF_PROMPTS=kind == "prompt",
                **_options(query, value_dim, scale, sliding_window, softcap, config),
            )
    of_sinks = lse.new_empty(0)
    if sinks is not None:
        share = torch.exp2(sinks.to(lse.dtype)[:, None] * _LOG2E - lse)
        of_sinks = -(share * delta).sum(1).to(sinks.dtype)
    return grads[0].to(dtype), grads[1].to(dtype), grads[2].to(dtype), of_sinks


def splits_of(text_rows: int, programs: int) -> int:
    """Over how many programs each of the prompts' is split by text rows; 0 without texts.

    Every split has partial sums of the size of the prompts' keys and values, in fp32: 100 prompts of 100 rows
    with 32 heads of 128 would take 10 GB in 32 splits, and have programs enough without.
    """
    most = min(_MAX_SPLITS, max(1, _MAX_PROGRAMS // max(1, programs)))
    return min(triton.cdiv(text_rows, _SPLIT_ROWS), most)


def _dense(vector: Tensor | None) -> Tensor | None:
    """The vector itself, or a copy of one with gaps: kernels read an entry for each head, side by side."""
    return None if vector is None else vector.contiguous()


def _readable(tensor: Tensor) -> Tensor:
    """The tensor itself; for the interpreter, which has no bf16 arithmetic, in fp32."""
    if tensor.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tensor.float()
    return tensor


def _accumulator(query: Tensor) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if query.dtype == torch.float64 else (torch.float32, tl.float32)


def _options(
    query: Tensor,
    value_dim: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    config: LaunchConfig,
) -> dict[str, Any]:
    """The arguments that all kernels have in common."""
    # Not `allow_tf32`, which raises where the newer setting was used.
    tf32 = query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "scale": scale,
        "softcap": 0.0 if softcap is None else softcap,
        "window": 0 if sliding_window is None else sliding_window,
        "HAS_WINDOW": sliding_window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "QUERIES": config.queries,
        "KEYS": config.keys,
        "HEAD": padded_dim(query.shape[2]),
        "VALUE": padded_dim(value_dim),
        "ACCUMULATOR": _accumulator(query)[1],
        "PRECISION": "tf32" if tf32 else "ieee",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
