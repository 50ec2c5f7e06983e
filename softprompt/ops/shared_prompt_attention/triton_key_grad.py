"""The kernel of d(key) and d(value) of `shared_prompt_attention`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from softprompt.ops.shared_prompt_attention.triton_blocks import BATCH_SIZES, gradient_of_scores, own_end


# Grid, with OF_PROMPTS: (blocks of KEYS prompt rows, splits, Hkv). A program writes the partial sums of
# d(key) and d(value) of its prompt rows over the text rows of its split, in the accumulator's dtype.
# Grid, without: (blocks of KEYS rows, 1, Hkv). A program writes d(key) and d(value) of its rows: from the
# later rows of their own text or prompt, and for prompt rows from the partial sums.
# Moves: the keys and values once; for each block, and each query head of its key head, the queries, grad_out,
# lse and delta of the rows that see it.
@triton.jit(do_not_specialize=BATCH_SIZES)
def attention_backward_key(
    query_ptr,  # [Hq, T, D]
    key_ptr,  # [Hkv, T, D]
    value_ptr,  # [Hkv, T, Dv]
    grad_out_ptr,  # [Hq, T, Dv]
    lse_ptr,  # [Hq, T]
    delta_ptr,  # [Hq, T]
    grad_key_ptr,  # [Hkv, T, D]
    grad_value_ptr,  # [Hkv, T, Dv]
    partial_key_ptr,  # [splits, Hkv, ΣP, D]
    partial_value_ptr,  # [splits, Hkv, ΣP, Dv]
    slopes_ptr,  # [Hq]
    query_position_ptr,  # [T], as the next four
    positions_ptr,
    key_position_ptr,
    segments_ptr,
    prefix_id_ptr,
    cu_prompts_ptr,  # [K + 1]
    cu_texts_ptr,  # [B + 1]
    num_rows,
    prompt_rows,  # ΣP
    num_prompts,
    num_texts,
    group,
    splits,
    split_rows,  # a multiple of QUERIES
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
    grad_out_head_stride,
    grad_out_row_stride,
    grad_out_stride,
    grad_key_head_stride,
    grad_key_row_stride,
    grad_value_head_stride,
    grad_value_row_stride,
    scale,
    softcap,
    window,
    OF_PROMPTS: tl.constexpr,
    MANY_PROMPTS: tl.constexpr,  # of the row; False without OF_PROMPTS
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first_key = tl.program_id(0) * KEYS
    split = tl.program_id(1)
    key_head = tl.program_id(2)
    keys = first_key + tl.arange(0, KEYS)
    if OF_PROMPTS:
        key_rows = prompt_rows
    else:
        key_rows = num_rows
    exists = keys < key_rows
    wide_keys, wide_head = keys.to(tl.int64), key_head.to(tl.int64)
    columns, value_columns = tl.arange(0, HEAD), tl.arange(0, VALUE)
    in_key = exists[:, None] & (columns < head_dim)[None, :]
    in_value = exists[:, None] & (value_columns < value_dim)[None, :]
    slot_k = tl.load(key_position_ptr + keys, mask=exists, other=2147483647)
    segment_k = tl.load(segments_ptr + keys, mask=exists, other=-1)
    first_dummy = num_prompts + num_texts
    is_dummy = segment_k >= first_dummy
    live_key = exists & ~is_dummy
    HAS_SLOPES: tl.constexpr = slopes_ptr is not None
    position_k = slot_k
    if HAS_SLOPES:
        position_k = tl.load(positions_ptr + keys, mask=exists, other=0)
    key = tl.load(
        key_ptr
        + wide_head * key_head_stride
        + wide_keys[:, None] * key_row_stride
        + columns[None, :] * key_stride,
        mask=in_key & live_key[:, None],
        other=0.0,
    )
    value = tl.load(
        value_ptr
        + wide_head * value_head_stride
        + wide_keys[:, None] * value_row_stride
        + value_columns[None, :] * value_stride,
        mask=in_value & live_key[:, None],
        other=0.0,
    )
    last_key = tl.minimum(first_key + KEYS, key_rows) - 1
    first_segment = tl.load(segments_ptr + first_key)
    last_segment = tl.load(segments_ptr + last_key)
    # Dummies stand behind the last text. What they hold must not meet other rows, not even with a probability
    # of zero; a mask made from the segments would have the copies of queries and grad_out wait for a load.
    last_end = tl.load(cu_texts_ptr + num_texts)
    if OF_PROMPTS:
        start = prompt_rows + split * split_rows
        end = tl.minimum(start + split_rows, last_end)
    else:
        # Rows before the block cannot see it; the last key's segment ends last.
        start = first_key
        end = own_end(last_key, last_segment, cu_prompts_ptr, cu_texts_ptr, num_prompts, num_texts)
        end = tl.minimum(end, last_end)
        if HAS_WINDOW:
            end = tl.minimum(end, last_key + window)
    grad_value = tl.zeros([KEYS, VALUE], ACCUMULATOR)
    if not OF_PROMPTS:
        # The output of a dummy is its own value; most blocks have none.
        for member in range(0, tl.where(last_segment >= first_dummy, group, 0)):
            grad_value += tl.load(
                grad_out_ptr
                + (key_head * group + member).to(tl.int64) * grad_out_head_stride
                + wide_keys[:, None] * grad_out_row_stride
                + value_columns[None, :] * grad_out_stride,
                mask=in_value & is_dummy[:, None],
                other=0.0,
            ).to(ACCUMULATOR)
    grad_key = tl.zeros([KEYS, HEAD], ACCUMULATOR)
    for member in range(0, group):
        head = (key_head * group + member).to(tl.int64)
        slope = 0.0
        if HAS_SLOPES:
            slope = tl.load(slopes_ptr + head).to(ACCUMULATOR)
        for first in range(start, end, QUERIES):
            rows = first + tl.arange(0, QUERIES)
            in_row = rows < end
            takes_part = True
            if MANY_PROMPTS:
                # Other prompts' texts, whole blocks of them as a rule, have no part in this block. With one
                # prompt there are none, and a branch would keep the loads from being pipelined.
                sees = tl.load(prefix_id_ptr + rows, mask=in_row, other=-2)
                takes_part = tl.max(((sees >= first_segment) & (sees <= last_segment)).to(tl.int32), 0) > 0
            elif OF_PROMPTS:
                sees = tl.zeros_like(rows)
            else:
                sees = tl.load(segments_ptr + rows, mask=in_row, other=-2)
            if takes_part:
                wide = rows.to(tl.int64)
                slot_q = tl.load(query_position_ptr + rows, mask=in_row, other=0)
                position_q = slot_q
                if HAS_SLOPES:
                    position_q = tl.load(positions_ptr + rows, mask=in_row, other=0)
                query = tl.load(
                    query_ptr
                    + head * query_head_stride
                    + wide[:, None] * query_row_stride
                    + columns[None, :] * query_stride,
                    mask=in_row[:, None] & (columns < head_dim)[None, :],
                    other=0.0,
                )
                grad_out = tl.load(
                    grad_out_ptr
                    + head * grad_out_head_stride
                    + wide[:, None] * grad_out_row_stride
                    + value_columns[None, :] * grad_out_stride,
                    mask=in_row[:, None] & (value_columns < value_dim)[None, :],
                    other=0.0,
                )
                lse = tl.load(lse_ptr + head * num_rows + rows, mask=in_row, other=float("inf"))
                delta = tl.load(delta_ptr + head * num_rows + rows, mask=in_row, other=0.0)
                seen = in_row[None, :] & (segment_k[:, None] == sees[None, :])
                if not OF_PROMPTS:  # every text stands behind its prompt
                    seen &= slot_k[:, None] <= slot_q[None, :]
                if HAS_WINDOW:
                    seen &= slot_q[None, :] - slot_k[:, None] < window
                dot = tl.dot(key, tl.trans(query), input_precision=PRECISION, out_dtype=ACCUMULATOR)
                grad_dot = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION, out_dtype=ACCUMULATOR)
                probabilities, grad = gradient_of_scores(
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
                    True,
                )
                grad_value = tl.dot(
                    probabilities.to(grad_out.dtype),
                    grad_out,
                    grad_value,
                    input_precision=PRECISION,
                    out_dtype=ACCUMULATOR,
                )
                grad_key = tl.dot(
                    grad.to(query.dtype), query, grad_key, input_precision=PRECISION, out_dtype=ACCUMULATOR
                )
    if OF_PROMPTS:
        place = ((split * tl.num_programs(2) + key_head) * prompt_rows).to(tl.int64) + keys
        tl.store(partial_key_ptr + place[:, None] * head_dim + columns[None, :], grad_key, mask=in_key)
        tl.store(
            partial_value_ptr + place[:, None] * value_dim + value_columns[None, :], grad_value, mask=in_value
        )
    else:
        of_prompt = (keys < prompt_rows)[:, None]
        parts = tl.where(first_key < prompt_rows, splits, 0)
        # One after the other, because the registers do not hold a part of each beside both sums.
        for part in range(0, parts):
            place = ((part * tl.num_programs(2) + key_head) * prompt_rows).to(tl.int64) + keys
            grad_key += tl.load(
                partial_key_ptr + place[:, None] * head_dim + columns[None, :],
                mask=in_key & of_prompt,
                other=0.0,
            )
        tl.store(
            grad_key_ptr
            + wide_head * grad_key_head_stride
            + wide_keys[:, None] * grad_key_row_stride
            + columns[None, :],
            grad_key.to(grad_key_ptr.dtype.element_ty),
            mask=in_key,
        )
        for part in range(0, parts):
            place = ((part * tl.num_programs(2) + key_head) * prompt_rows).to(tl.int64) + keys
            grad_value += tl.load(
                partial_value_ptr + place[:, None] * value_dim + value_columns[None, :],
                mask=in_value & of_prompt,
                other=0.0,
            )
        tl.store(
            grad_value_ptr
            + wide_head * grad_value_head_stride
            + wide_keys[:, None] * grad_value_row_stride
            + value_columns[None, :],
            grad_value.to(grad_value_ptr.dtype.element_ty),
            mask=in_value,
        )
