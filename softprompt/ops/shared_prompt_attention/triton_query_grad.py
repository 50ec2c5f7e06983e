"""The kernel of d(query) of `shared_prompt_attention`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from softprompt.ops.shared_prompt_attention.triton_blocks import (
    BATCH_SIZES,
    gradient_of_scores,
    key_ranges,
    seen_pairs,
)


@triton.jit
def _query_range(
    accumulated,
    query,
    grad_out,
    lse,
    delta,
    key_ptr,
    value_ptr,
    key_slots_ptr,
    segments_ptr,
    positions_ptr,
    slot_q,
    segment_q,
    prefix_q,
    position_q,
    slope,
    start,
    end,
    key_row_stride,
    key_stride,
    value_row_stride,
    value_stride,
    head_dim,
    value_dim,
    scale,
    softcap,
    window,
    UNIFORM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what the keys in start .. end - 1 give to d(query) of a block."""
    columns, value_columns = tl.arange(0, HEAD), tl.arange(0, VALUE)
    for first in range(start, end, KEYS):
        keys = first + tl.arange(0, KEYS)
        exists = keys < end
        wide = keys.to(tl.int64)
        segment_k = keys
        if not UNIFORM:
            segment_k = tl.load(segments_ptr + keys, mask=exists, other=-1)
        slot_k = tl.load(key_slots_ptr + keys, mask=exists, other=2147483647)
        key = tl.load(
            key_ptr + wide[:, None] * key_row_stride + columns[None, :] * key_stride,
            mask=exists[:, None] & (columns < head_dim)[None, :],
            other=0.0,
        )
        value = tl.load(
            value_ptr + wide[:, None] * value_row_stride + value_columns[None, :] * value_stride,
            mask=exists[:, None] & (value_columns < value_dim)[None, :],
            other=0.0,
        )
        position_k = keys
        if HAS_SLOPES:
            position_k = tl.load(positions_ptr + keys, mask=exists, other=0)
        if UNIFORM:
            seen = (exists & (slot_k != 2147483647))[None, :]
        else:
            seen = seen_pairs(slot_q, segment_q, prefix_q, slot_k, segment_k, window, HAS_WINDOW)
        dot = tl.dot(query, tl.trans(key), input_precision=PRECISION, out_dtype=accumulated.dtype)
        grad_dot = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION, out_dtype=accumulated.dtype)
        _, grad = gradient_of_scores(
            dot,
            grad_dot,
            lse,
            delta,
            seen,
            slope,
            position_q,
            position_k,
            scale,
            softcap,
            HAS_SOFTCAP,
            HAS_SLOPES,
            False,
        )
        accumulated = tl.dot(
            grad.to(key.dtype), key, accumulated, input_precision=PRECISION, out_dtype=accumulated.dtype
        )
    return accumulated


# Grid: (blocks of QUERIES rows, Hq). A program writes d(query) of its rows and head, and `delta`, the sum of
# grad_out * out of each row, which the kernels after it read. Moves what `attention_forward` moves, and
# grad_out.
@triton.jit(do_not_specialize=BATCH_SIZES)
def attention_backward_query(
    query_ptr,  # [Hq, T, D]
    key_ptr,  # [Hkv, T, D]
    value_ptr,  # [Hkv, T, Dv]
    out_ptr,  # [Hq, T, Dv]
    grad_out_ptr,  # [Hq, T, Dv]
    lse_ptr,  # [Hq, T]
    delta_ptr,  # [Hq, T]
    grad_query_ptr,  # [Hq, T, D]
    slopes_ptr,  # [Hq]
    query_position_ptr,  # [T], as the next four
    positions_ptr,
    key_slots_ptr,
    segments_ptr,
    prefix_id_ptr,
    cu_prompts_ptr,  # [K + 1]
    cu_texts_ptr,  # [B + 1]
    num_rows,
    num_prompts,
    num_texts,
    group,
    head_dim,
    value_dim,
    query_head_stride,
    query_row_stride,
    query_stride,
    key_head_stride,
    key_row_stride,
    key_stride,
    value_head_stride,
    value_row_stride,
    value_stride,
    out_head_stride,
    out_row_stride,
    grad_out_head_stride,
    grad_out_row_stride,
    grad_out_stride,
    grad_query_head_stride,
    grad_query_row_stride,
    scale,
    softcap,
    window,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    first = block * QUERIES
    rows = first + tl.arange(0, QUERIES)
    in_row = rows < num_rows
    wide, wide_head = rows.to(tl.int64), head.to(tl.int64)
    columns, value_columns = tl.arange(0, HEAD), tl.arange(0, VALUE)
    slot_q = tl.load(query_position_ptr + rows, mask=in_row, other=0)
    segment_q = tl.load(segments_ptr + rows, mask=in_row, other=-2)
    first_dummy = num_prompts + num_texts
    live = in_row & (segment_q < first_dummy)
    prefix_q = tl.load(prefix_id_ptr + rows, mask=live, other=-2)
    position_q = slot_q
    slope = 0.0
    if slopes_ptr is not None:
        position_q = tl.load(positions_ptr + rows, mask=in_row, other=0)
        slope = tl.load(slopes_ptr + head).to(ACCUMULATOR)
    prompt_from, prompt_to, own, uniform = key_ranges(
        rows,
        in_row,
        segment_q,
        prefix_q,
        first,
        segments_ptr,
        cu_prompts_ptr,
        cu_texts_ptr,
        num_prompts,
        num_texts,
        window,
        HAS_WINDOW,
    )
    query = tl.load(
        query_ptr
        + wide_head * query_head_stride
        + wide[:, None] * query_row_stride
        + columns[None, :] * query_stride,
        mask=live[:, None] & (columns < head_dim)[None, :],
        other=0.0,
    )
    in_value = live[:, None] & (value_columns < value_dim)[None, :]
    grad_out = tl.load(
        grad_out_ptr
        + wide_head * grad_out_head_stride
        + wide[:, None] * grad_out_row_stride
        + value_columns[None, :] * grad_out_stride,
        mask=in_value,
        other=0.0,
    )
    out = tl.load(
        out_ptr + wide_head * out_head_stride + wide[:, None] * out_row_stride + value_columns[None, :],
        mask=in_value,
        other=0.0,
    )
    delta = tl.sum(out.to(ACCUMULATOR) * grad_out.to(ACCUMULATOR), 1)
    tl.store(delta_ptr + wide_head * num_rows + rows, delta, mask=in_row)
    lse = tl.load(lse_ptr + wide_head * num_rows + rows, mask=live, other=float("inf"))
    key_ptr += (head // group).to(tl.int64) * key_head_stride
    value_ptr += (head // group).to(tl.int64) * value_head_stride
    accumulated = tl.zeros([QUERIES, HEAD], ACCUMULATOR)
    # Dummies stand behind the last text. What they hold must not meet other rows, not even with a probability
    # of zero; a mask made from the segments would have the copies of keys and values wait for a load.
    last = tl.minimum(first + QUERIES, tl.load(cu_texts_ptr + num_texts))
    HAS_SLOPES: tl.constexpr = slopes_ptr is not None
    if uniform:
        for part in tl.static_range(2):
            accumulated = _query_range(
                accumulated,
                query,
                grad_out,
                lse,
                delta,
                key_ptr,
                value_ptr,
                key_slots_ptr,
                segments_ptr,
                positions_ptr,
                slot_q,
                segment_q,
                prefix_q,
                position_q,
                slope,
                prompt_from if part == 0 else own,
                prompt_to if part == 0 else first,
                key_row_stride,
                key_stride,
                value_row_stride,
                value_stride,
                head_dim,
                value_dim,
                scale,
                softcap,
                window,
                True,
                HAS_WINDOW,
                HAS_SOFTCAP,
                HAS_SLOPES,
                KEYS,
                HEAD,
                VALUE,
                PRECISION,
            )
        own = first
        prompt_to = prompt_from
    for part in tl.static_range(2):
        accumulated = _query_range(
            accumulated,
            query,
            grad_out,
            lse,
            delta,
            key_ptr,
            value_ptr,
            key_slots_ptr,
            segments_ptr,
            positions_ptr,
            slot_q,
            segment_q,
            prefix_q,
            position_q,
            slope,
            prompt_from if part == 0 else own,
            prompt_to if part == 0 else last,
            key_row_stride,
            key_stride,
            value_row_stride,
            value_stride,
            head_dim,
            value_dim,
            scale,
            softcap,
            window,
            False,
            HAS_WINDOW,
            HAS_SOFTCAP,
            HAS_SLOPES,
            KEYS,
            HEAD,
            VALUE,
            PRECISION,
        )
    tl.store(
        grad_query_ptr
        + wide_head * grad_query_head_stride
        + wide[:, None] * grad_query_row_stride
        + columns[None, :],
        accumulated.to(grad_query_ptr.dtype.element_ty),
        mask=in_row[:, None] & (columns < head_dim)[None, :],
    )
