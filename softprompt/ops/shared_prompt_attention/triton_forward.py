"""The forward kernel of `shared_prompt_attention`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from softprompt.ops.shared_prompt_attention.triton_blocks import (
    BATCH_SIZES,
    key_ranges,
    scores_of,
    seen_pairs,
)


@triton.jit
def _forward_range(
    accumulated,
    total,
    highest,
    query,
    key_ptr,  # of the head
    value_ptr,
    key_position_ptr,
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
    """Adds the keys in start .. end - 1 to the running softmax of a block of queries."""
    columns, value_columns = tl.arange(0, HEAD), tl.arange(0, VALUE)
    for first in range(start, end, KEYS):
        keys = first + tl.arange(0, KEYS)
        exists = keys < end
        wide = keys.to(tl.int64)
        segment_k = keys
        if not UNIFORM:
            segment_k = tl.load(segments_ptr + keys, mask=exists, other=-1)
        slot_k = tl.load(key_position_ptr + keys, mask=exists, other=2147483647)
        key = tl.load(
            key_ptr + wide[None, :] * key_row_stride + columns[:, None] * key_stride,
            mask=exists[None, :] & (columns < head_dim)[:, None],
            other=0.0,
        )
        dot = tl.dot(query, key, input_precision=PRECISION, out_dtype=accumulated.dtype)
        position_k = keys
        if HAS_SLOPES:
            position_k = tl.load(positions_ptr + keys, mask=exists, other=0)
        scores, _ = scores_of(dot, slope, position_q, position_k, scale, softcap, HAS_SOFTCAP, HAS_SLOPES)
        if UNIFORM:
            seen = (exists & (slot_k != 2147483647))[None, :]
        else:
            seen = seen_pairs(slot_q, segment_q, prefix_q, slot_k, segment_k, window, HAS_WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        now_highest = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(now_highest == float("-inf"), 0.0, now_highest)
        probabilities = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(highest - shift)
        total = total * decay + tl.sum(probabilities, 1)
        value = tl.load(
            value_ptr + wide[:, None] * value_row_stride + value_columns[None, :] * value_stride,
            mask=exists[:, None] & (value_columns < value_dim)[None, :],
            other=0.0,
        )
        accumulated = accumulated * decay[:, None]
        accumulated = tl.dot(
            probabilities.to(value.dtype),
            value,
            accumulated,
            input_precision=PRECISION,
            out_dtype=accumulated.dtype,
        )
        highest = now_highest
    return accumulated, total, highest


# Grid: (blocks of QUERIES rows, Hq). A program writes the output and the log-sum-exp of its rows and head.
# Moves: the queries and the output once; the keys and values that its rows see once for each program.
@triton.jit(do_not_specialize=BATCH_SIZES)
def attention_forward(
    query_ptr,  # [Hq, T, D]
    key_ptr,  # [Hkv, T, D]
    value_ptr,  # [Hkv, T, Dv]
    out_ptr,  # [Hq, T, Dv]
    lse_ptr,  # [Hq, T]
    slopes_ptr,  # [Hq]
    sinks_ptr,  # [Hq]
    query_position_ptr,  # [T], as the next four
    positions_ptr,
    key_position_ptr,
    segments_ptr,
    prefix_id_ptr,
    cu_prompts_ptr,  # [K + 1]
    cu_texts_ptr,  # [B + 1]
    num_rows,
    num_prompts,
    num_texts,
    group,  # query heads of a key head
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
    # The last blocks of a text see the most keys: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    first = block * QUERIES
    rows = first + tl.arange(0, QUERIES)
    in_row = rows < num_rows
    columns, value_columns = tl.arange(0, HEAD), tl.arange(0, VALUE)
    slot_q = tl.load(query_position_ptr + rows, mask=in_row, other=0)
    segment_q = tl.load(segments_ptr + rows, mask=in_row, other=-2)
    first_dummy = num_prompts + num_texts  # segments from here on are dummies, each of its own
    is_dummy = segment_q >= first_dummy
    live = in_row & ~is_dummy
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
        + head.to(tl.int64) * query_head_stride
        + rows.to(tl.int64)[:, None] * query_row_stride
        + columns[None, :] * query_stride,
        mask=live[:, None] & (columns < head_dim)[None, :],
        other=0.0,
    )
    key_ptr += (head // group).to(tl.int64) * key_head_stride
    value_ptr += (head // group).to(tl.int64) * value_head_stride
    accumulated = tl.zeros([QUERIES, VALUE], ACCUMULATOR)
    if sinks_ptr is not None:
        # A sink is a key that was there before all others, without a value.
        sink = tl.load(sinks_ptr + head).to(ACCUMULATOR) * 1.4426950408889634
        highest = tl.zeros([QUERIES], ACCUMULATOR) + sink
        total = tl.full([QUERIES], 1.0, ACCUMULATOR)
    else:
        highest = tl.full([QUERIES], float("-inf"), ACCUMULATOR)
        total = tl.zeros([QUERIES], ACCUMULATOR)
    # Dummies stand behind the last text. What they hold must not meet other rows, not even with a probability
    # of zero; a mask made from the segments would have the copies of keys and values wait for a load.
    last = tl.minimum(first + QUERIES, tl.load(cu_texts_ptr + num_texts))
    HAS_SLOPES: tl.constexpr = slopes_ptr is not None
    if uniform:
        for part in tl.static_range(2):
            accumulated, total, highest = _forward_range(
                accumulated,
                total,
                highest,
                query,
                key_ptr,
                value_ptr,
                key_position_ptr,
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
        accumulated, total, highest = _forward_range(
            accumulated,
            total,
            highest,
            query,
            key_ptr,
            value_ptr,
            key_position_ptr,
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
    nothing = total == 0.0
    out = accumulated / tl.where(nothing, 1.0, total)[:, None]
    # A row that sees nothing: its output is zero, and so is every probability made with this.
    lse = tl.where(nothing, float("inf"), highest + tl.log2(tl.where(nothing, 1.0, total)))
    own_value = tl.load(
        value_ptr + rows.to(tl.int64)[:, None] * value_row_stride + value_columns[None, :] * value_stride,
        mask=is_dummy[:, None] & (value_columns < value_dim)[None, :],
        other=0.0,
    )
    out = tl.where(is_dummy[:, None], own_value.to(out.dtype), out)
    tl.store(
        out_ptr
        + head.to(tl.int64) * out_head_stride
        + rows.to(tl.int64)[:, None] * out_row_stride
        + value_columns[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=in_row[:, None] & (value_columns < value_dim)[None, :],
    )
    tl.store(lse_ptr + head.to(tl.int64) * num_rows + rows, lse, mask=in_row)
