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

from softprompt.ops.constants import LOG2E
from softprompt.ops.shared_prompt_attention.configs import (
    LaunchConfig,
    architecture,
    launch_config,
    padded_dim,
)
from softprompt.ops.shared_prompt_attention.layout import (
    Attended,
    AttentionLayout,
    AttentionOptions,
    rows_first,
)
from softprompt.ops.shared_prompt_attention.triton_forward import attention_forward
from softprompt.ops.shared_prompt_attention.triton_key_grad import attention_backward_key
from softprompt.ops.shared_prompt_attention.triton_query_grad import attention_backward_query

_SPLIT_PROGRAMS = 264  # two for each processor of an H100 or H200: all of them run at a time
_FEWEST_SPLIT_ROWS = 64  # text rows for each partial sum of a prompt's gradient
_MAX_SPLITS = 32  # one program adds them up, one after the other


def forward(
    query: Tensor,  # [Hq, T, D]
    key: Tensor,  # [Hkv, T, D]
    value: Tensor,  # [Hkv, T, Dv]
    sinks: Tensor | None,  # [Hq]
    layout: AttentionLayout,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """The output [Hq, T, Dv], a token's heads side by side, and the log-sum-exp [Hq, T] in units of log2."""
    dtype = value.dtype
    query, key, value = _readable(query), _readable(key), _readable(value)
    num_heads, num_rows, head_dim = query.shape
    value_dim = value.shape[2]
    out = rows_first(value, num_heads)
    lse = torch.empty(num_heads, num_rows, dtype=_accumulator(query)[0], device=query.device)
    launch = _Launch(query, key, value, layout, options)
    with torch.cuda.device_of(query):
        config = launch.config("forward")
        attention_forward[(triton.cdiv(num_rows, config.queries), num_heads)](
            query,
            key,
            value,
            out,
            lse,
            launch.slopes,
            _dense(sinks),
            *launch.index,
            num_rows,
            *launch.counts,
            head_dim,
            value_dim,
            *launch.strides,
            *out.stride()[:2],
            **launch.options(config),
        )
    return out.to(dtype), lse


def backward(
    grad_out: Tensor,  # [Hq, T, Dv]
    saved: Attended,
    layout: AttentionLayout,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d(query), d(key), d(value), and d(sinks), which is empty where there are none."""
    dtype, sinks, lse = saved.query.dtype, saved.sinks, saved.lse
    grad_out, query, key, value, out = (
        _readable(t) for t in (grad_out, saved.query, saved.key, saved.value, saved.out)
    )
    num_heads, num_rows, head_dim = query.shape
    num_key_heads, value_dim = key.shape[0], value.shape[2]
    prompt_rows = layout.prompt_tokens
    grad_query, grad_key, grad_value = (rows_first(tensor) for tensor in (query, key, value))
    delta = torch.empty_like(lse)
    launch = _Launch(query, key, value, layout, options)
    with torch.cuda.device_of(query):
        config = launch.config("query")
        attention_backward_query[(triton.cdiv(num_rows, config.queries), num_heads)](
            query,
            key,
            value,
            out,
            grad_out,
            lse,
            delta,
            grad_query,
            launch.slopes,
            *launch.index,
            num_rows,
            *launch.counts,
            head_dim,
            value_dim,
            *launch.strides,
            *out.stride()[:2],
            *grad_out.stride(),
            *grad_query.stride()[:2],
            **launch.options(config),
        )
        config = launch.config("prompt")
        programs = triton.cdiv(prompt_rows, config.keys) * num_key_heads
        splits, split_rows = splits_of(num_rows - prompt_rows, programs, config.queries)
        partial = [lse.new_empty(splits, num_key_heads, prompt_rows, size) for size in (head_dim, value_dim)]
        for kind, key_rows in (("prompt", prompt_rows), ("key", num_rows)):
            config = launch.config(kind)
            if kind == "prompt" and splits == 0:
                continue
            grid = (triton.cdiv(key_rows, config.keys), splits if kind == "prompt" else 1, num_key_heads)
            attention_backward_key[grid](
                query,
                key,
                value,
                grad_out,
                lse,
                delta,
                grad_key,
                grad_value,
                *partial,
                launch.slopes,
                *launch.index,
                num_rows,
                prompt_rows,
                *launch.counts,
                splits,
                split_rows,
                head_dim,
                value_dim,
                *launch.strides,
                *grad_out.stride(),
                *grad_key.stride()[:2],
                *grad_value.stride()[:2],
                OF_PROMPTS=kind == "prompt",
                MANY_PROMPTS=kind == "prompt" and len(layout.prompt_lengths) > 1,
                **launch.options(config),
            )
    of_sinks = lse.new_empty(0)
    if sinks is not None:
        share = torch.exp2(sinks.to(lse.dtype)[:, None] * LOG2E - lse)
        of_sinks = -(share * delta).sum(1).to(sinks.dtype)
    return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype), of_sinks


def splits_of(text_rows: int, programs: int, queries: int) -> tuple[int, int]:
    """Over how many programs each of the prompts' is split by text rows, and the rows of each.

    As many as make 132 to 264 programs, where every one but the last has at least 64 rows. Every split has
    partial sums of the size of the prompts' keys and values, in fp32; prompts that are enough programs
    without are not split.

    Args:
        text_rows: all rows but the prompts'.
        programs: of one split.
        queries: rows of a block; those of a split are a multiple of it.

    Returns:
        Number of splits, 0 without texts, and rows of each.
    """
    most = min(_MAX_SPLITS, max(1, _SPLIT_PROGRAMS // max(1, programs)))
    rows = max(_FEWEST_SPLIT_ROWS, triton.cdiv(text_rows, most))
    rows = triton.cdiv(rows, queries) * queries
    return triton.cdiv(text_rows, rows), rows


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


class _Launch:
    """What the launches of one call have in common."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, options: AttentionOptions
    ) -> None:
        self._query, self._widths, self._given = query, (query.shape[2], value.shape[2]), options
        self.slopes = _dense(options.alibi_slopes)
        self.index = (
            layout.query_position,
            layout.position_ids,
            layout.key_position,
            layout.segments,
            layout.prefix_id,
            layout.cu_prompts,
            layout.cu_texts,
        )
        prompts, texts = layout.cu_prompts.shape[0] - 1, layout.cu_texts.shape[0] - 1
        self.counts = (prompts, texts, query.shape[0] // key.shape[0])
        self.strides = (*query.stride(), *key.stride(), *value.stride())

    def config(self, kind: str) -> LaunchConfig:
        device, itemsize = self._query.device, self._query.element_size()
        return launch_config(kind, max(self._widths), itemsize, architecture(device))

    def options(self, config: LaunchConfig) -> dict[str, Any]:
        """The arguments that all kernels take by name."""
        # Not `allow_tf32`, which raises where the newer setting was used.
        tf32 = self._query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        window, softcap = self._given.sliding_window, self._given.softcap
        return {
            "scale": self._given.scale,
            "softcap": 0.0 if softcap is None else softcap,
            "window": 0 if window is None else window,
            "HAS_WINDOW": window is not None,
            "HAS_SOFTCAP": softcap is not None,
            "QUERIES": config.queries,
            "KEYS": config.keys,
            "HEAD": padded_dim(self._widths[0]),
            "VALUE": padded_dim(self._widths[1]),
            "ACCUMULATOR": _accumulator(self._query)[1],
            "PRECISION": "tf32" if tf32 else "ieee",
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
