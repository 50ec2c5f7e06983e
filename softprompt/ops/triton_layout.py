"""`pack_layout` in one Triton launch.

The place of a token depends on the counts of everything in front of it. Programs do not wait for each other:
each one counts the whole batch by itself, which stays in the L2 cache (1 MB at 65,536 int64 mask entries and
labels), so one launch is enough and the order in which programs run does not matter.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt.ops import constants
from softprompt.ops.pack_layout import Batch, Packing, prompt_offsets

IGNORE_INDEX = tl.constexpr(constants.IGNORE_INDEX)
MASKED_KEY = tl.constexpr(constants.MASKED_KEY)
TILE = 2048
NUM_WARPS = 8


def pack_layout(batch: Batch, prompt_lengths: list[int], packing: Packing, *out: Tensor) -> None:
    mask = batch.attention_mask
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    num_rows, row_length = mask.shape
    tensors = [_with_dense_rows(tensor) for tensor in (mask, batch.labels, batch.input_ids)]

    # Of prompts that have one length it is a product.
    lengths = tuple(prompt_lengths)
    offsets = None if len(set(lengths)) == 1 else prompt_offsets(lengths, mask.device)

    columns = min(TILE, max(16, triton.next_power_of_2(row_length)))
    rows = TILE // columns
    column_tiles = max(1, triton.cdiv(row_length, columns))
    num_tiles = triton.cdiv(num_rows, rows) * column_tiles
    with torch.cuda.device_of(mask):
        _pack_layout[(1 + max(1, num_tiles),)](
            *tensors,
            batch.prompt_of_row,
            offsets,
            *out,
            num_rows,
            row_length,
            len(prompt_lengths),
            prompt_lengths[0],
            sum(prompt_lengths),
            packing.vocab_size,
            packing.capacity,
            packing.label_capacity,
            num_tiles,
            column_tiles,
            *(0 if tensor is None else tensor.stride(0) for tensor in (*tensors, batch.prompt_of_row)),
            POSITIONS=packing.positions,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=NUM_WARPS,
        )


def _with_dense_rows(tensor: Tensor | None) -> Tensor | None:
    """The kernel takes any distance between rows and none between the columns of a row."""
    return tensor if tensor is None or tensor.stride(1) == 1 else tensor.contiguous()


# Grid: 1 + number of tiles. Program 0 writes the counts; program 1 + t owns tile t of ROWS x COLUMNS batch
# entries (ROWS is 1 where a row is longer than a tile) and a share of the rows without text or label.
# Moves: mask, labels and ids are read, 24 bytes are written per packed row and 8 per label row.
@triton.jit(
    do_not_specialize=[
        "num_rows",
        "row_length",
        "num_prompts",
        "prompt_length",
        "prompt_tokens",
        "vocab_size",
        "capacity",
        "label_capacity",
        "num_tiles",
        "column_tiles",
        "mask_stride",
        "labels_stride",
        "ids_stride",
    ]
)
def _pack_layout(
    mask_ptr,  # [B, L]
    labels_ptr,  # [B, L] or None
    ids_ptr,  # [B, L] or None
    prompt_of_row_ptr,  # [B] or None
    cu_prompts_ptr,  # [K + 1] or None
    token_index_ptr,  # [C]
    position_ids_ptr,  # [C]
    query_position_ptr,  # [C]
    key_position_ptr,  # [C]
    segments_ptr,  # [C]
    prefix_id_ptr,  # [C]
    cu_texts_ptr,  # [B + 1]
    label_rows_ptr,  # [R]
    label_targets_ptr,  # [R]
    counts_ptr,  # [5]
    num_rows,
    row_length,
    num_prompts,
    prompt_length,
    prompt_tokens,
    vocab_size,
    capacity,
    label_capacity,
    num_tiles,
    column_tiles,
    mask_stride,
    labels_stride,
    ids_stride,
    prompt_of_row_stride,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    own = tl.program_id(0) - 1

    # Sums over tiles are kept per entry and reduced after the loop: only program 0 has barriers in it.
    all_packed = tl.full([ROWS, COLUMNS], 0, tl.int32)
    all_labelled = tl.full([ROWS, COLUMNS], 0, tl.int32)
    packed_before = tl.full([ROWS, COLUMNS], 0, tl.int32)
    labelled_before = tl.full([ROWS, COLUMNS], 0, tl.int32)
    packed_in_row = tl.full([ROWS, COLUMNS], 0, tl.int32)
    real_in_row = tl.full([ROWS, COLUMNS], 0, tl.int32)
    out_of_range = tl.full([ROWS, COLUMNS], 0, tl.int32)
    text_length = tl.full([ROWS], 0, tl.int32)
    longest_text = tl.full([ROWS], 0, tl.int32)
    longest_context = tl.full([ROWS], 0, tl.int32)
    for tile in range(num_tiles):
        rows, columns = _entries_of_tile(tile, column_tiles, ROWS, COLUMNS)
        real, packed, labelled = _read_tile(
            mask_ptr, labels_ptr, rows, columns, num_rows, row_length, mask_stride, labels_stride, POSITIONS
        )
        all_packed += packed
        all_labelled += labelled
        if tile < own:
            packed_before += packed
            labelled_before += labelled
            if tile // column_tiles == own // column_tiles:
                packed_in_row += packed
                real_in_row += real
        if own < 0:
            out_of_range += _outside_vocabulary(
                ids_ptr, rows, columns, num_rows, row_length, ids_stride, vocab_size, MAY_IGNORE=False
            )
            out_of_range += _outside_vocabulary(
                labels_ptr, rows, columns, num_rows, row_length, labels_stride, vocab_size, MAY_IGNORE=True
            )
            text_length = tl.where(tile % column_tiles == 0, 0, text_length) + tl.sum(packed, 1)
            longest_text = tl.maximum(longest_text, text_length)
            _, _, prefix = _prompt_of_rows(
                prompt_of_row_ptr,
                cu_prompts_ptr,
                rows,
                num_rows,
                num_prompts,
                prompt_length,
                prompt_of_row_stride,
            )
            context = tl.where(rows < num_rows, prefix + text_length, 0)
            longest_context = tl.maximum(longest_context, context)
    num_tokens = tl.sum(all_packed)
    num_labels = tl.sum(all_labelled)

    if own < 0:
        tl.store(cu_texts_ptr + num_rows, prompt_tokens + num_tokens)
        tl.store(counts_ptr, num_tokens)
        tl.store(counts_ptr + 1, num_labels)
        tl.store(counts_ptr + 2, tl.sum(out_of_range))
        tl.store(counts_ptr + 3, tl.max(longest_text))
        tl.store(counts_ptr + 4, tl.max(longest_context))
    else:
        rows, columns = _entries_of_tile(own, column_tiles, ROWS, COLUMNS)
        real, packed, labelled = _read_tile(
            mask_ptr, labels_ptr, rows, columns, num_rows, row_length, mask_stride, labels_stride, POSITIONS
        )
        prompt, prompt_start, prefix = _prompt_of_rows(
            prompt_of_row_ptr,
            cu_prompts_ptr,
            rows,
            num_rows,
            num_prompts,
            prompt_length,
            prompt_of_row_stride,
        )
        first_of_row, earlier_in_row = _exclusive_counts(packed, packed_before)
        first_of_row += prompt_tokens
        destination = first_of_row[:, None] + earlier_in_row

        slot = prefix[:, None] + columns[None, :]
        position = slot
        if POSITIONS != "slots":
            rank = tl.cumsum(real, 1) - 1 + tl.sum(real_in_row, 1)[:, None]
            position = tl.where(real != 0, prefix[:, None] + rank, -1)
        if POSITIONS == "compact":
            slot = position
        is_packed = packed != 0
        tl.store(token_index_ptr + destination, rows[:, None] * row_length + columns[None, :], mask=is_packed)
        tl.store(position_ids_ptr + destination, position, mask=is_packed)
        tl.store(query_position_ptr + destination, slot, mask=is_packed)
        tl.store(key_position_ptr + destination, tl.where(real != 0, slot, MASKED_KEY), mask=is_packed)
        segment = tl.broadcast_to((num_prompts + rows)[:, None], [ROWS, COLUMNS])
        tl.store(segments_ptr + destination, segment, mask=is_packed)
        tl.store(
            prefix_id_ptr + destination, tl.broadcast_to(prompt[:, None], [ROWS, COLUMNS]), mask=is_packed
        )
        if own % column_tiles == 0:
            tl.store(cu_texts_ptr + rows, first_of_row, mask=rows < num_rows)

        if labels_ptr is not None:
            first_label, earlier_labels = _exclusive_counts(labelled, labelled_before)
            earlier_in_row += tl.sum(packed_in_row, 1)[:, None]
            predictor = tl.where(earlier_in_row > 0, destination, (prompt_start + prefix)[:, None]) - 1
            is_labelled = labelled != 0
            entries = rows.to(tl.int64)[:, None] * labels_stride + columns[None, :]
            target = tl.load(labels_ptr + entries, mask=is_labelled, other=0).to(tl.int32)
            label_destination = first_label[:, None] + earlier_labels
            tl.store(label_rows_ptr + label_destination, predictor, mask=is_labelled)
            tl.store(label_targets_ptr + label_destination, target, mask=is_labelled)

        tile_size: tl.constexpr = ROWS * COLUMNS
        num_writers = tl.num_programs(0) - 1
        for start in range(own * tile_size, tl.maximum(capacity, label_capacity), num_writers * tile_size):
            row = start + tl.arange(0, tile_size)
            is_prompt = row < prompt_tokens
            number, first = _prompt_at(cu_prompts_ptr, row, num_prompts, prompt_length)
            place = tl.where(is_prompt, row - first, 0)
            own_segment = tl.where(is_prompt, number, num_prompts + num_rows + row)
            no_text = (is_prompt | (row >= prompt_tokens + num_tokens)) & (row < capacity)
            tl.store(token_index_ptr + row, -1, mask=no_text)
            tl.store(position_ids_ptr + row, place, mask=no_text)
            tl.store(query_position_ptr + row, place, mask=no_text)
            tl.store(key_position_ptr + row, place, mask=no_text)
            tl.store(segments_ptr + row, own_segment, mask=no_text)
            tl.store(prefix_id_ptr + row, own_segment, mask=no_text)
            no_label = (row >= num_labels) & (row < label_capacity)
            tl.store(label_rows_ptr + row, 0, mask=no_label)
            tl.store(label_targets_ptr + row, IGNORE_INDEX, mask=no_label)


@triton.jit
def _entries_of_tile(tile, column_tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of the batch in tile number `tile`; tiles follow the order of the packed row."""
    rows = (tile // column_tiles) * ROWS + tl.arange(0, ROWS)
    columns = (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    return rows, columns


@triton.jit
def _read_tile(
    mask_ptr,
    labels_ptr,
    rows,
    columns,
    num_rows,
    row_length,
    mask_stride,
    labels_stride,
    POSITIONS: tl.constexpr,
):
    """Three tiles of 0 and 1: real tokens, packed tokens, labels that are predicted."""
    inside = (rows < num_rows)[:, None] & (columns < row_length)[None, :]
    entries = rows.to(tl.int64)[:, None] * mask_stride + columns[None, :]
    mask = tl.load(mask_ptr + entries, mask=inside, other=0)
    if mask.dtype == tl.bfloat16:
        mask = mask.to(tl.float32)
    real = (mask != 0) & inside
    packed = real
    labelled = tl.zeros_like(real)
    if labels_ptr is not None:
        entries = rows.to(tl.int64)[:, None] * labels_stride + columns[None, :]
        label = tl.load(labels_ptr + entries, mask=inside, other=IGNORE_INDEX).to(tl.int64)
        labelled = (label != IGNORE_INDEX) & inside
        if POSITIONS == "compact":
            labelled = labelled & real
        else:
            has_next = inside & (columns + 1 < row_length)[None, :]
            label = tl.load(labels_ptr + entries + 1, mask=has_next, other=0).to(tl.int64)
            packed = real | ((label != IGNORE_INDEX) & has_next)
    return real.to(tl.int32), packed.to(tl.int32), labelled.to(tl.int32)


@triton.jit
def _outside_vocabulary(
    ptr, rows, columns, num_rows, row_length, stride, vocab_size, MAY_IGNORE: tl.constexpr
):
    """1 where an id or a label is outside the vocabulary; 0 everywhere where there are none."""
    inside = (rows < num_rows)[:, None] & (columns < row_length)[None, :]
    wrong = tl.zeros_like(inside)
    if ptr is not None:
        entries = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        value = tl.load(ptr + entries, mask=inside, other=0).to(tl.int64)
        wrong = inside & ((value < 0) | (value >= vocab_size))
        if MAY_IGNORE:
            wrong = wrong & (value != IGNORE_INDEX)
    return wrong.to(tl.int32)


@triton.jit
def _exclusive_counts(flags, flags_before):
    """How many flags are set in front of each row of the tile, and in front of each entry in its row."""
    of_row = tl.sum(flags, 1)
    before_row = tl.sum(flags_before) + tl.cumsum(of_row, 0) - of_row
    return before_row, tl.cumsum(flags, 1) - flags


@triton.jit
def _prompt_of_rows(
    prompt_of_row_ptr, cu_prompts_ptr, rows, num_rows, num_prompts, prompt_length, prompt_of_row_stride
):
    """Number, first row and length of the prompt that each row of the batch sees."""
    prompt = tl.zeros_like(rows)
    if prompt_of_row_ptr is not None:
        pointers = prompt_of_row_ptr + rows.to(tl.int64) * prompt_of_row_stride
        prompt = tl.load(pointers, mask=rows < num_rows, other=0).to(tl.int32)
    start = prompt * prompt_length
    length = tl.zeros_like(rows) + prompt_length
    if cu_prompts_ptr is not None:
        known = (prompt >= 0) & (prompt < num_prompts)
        start = tl.load(cu_prompts_ptr + prompt, mask=known, other=0)
        length = tl.load(cu_prompts_ptr + prompt + 1, mask=known, other=0) - start
    return prompt, start, length


@triton.jit
def _prompt_at(cu_prompts_ptr, row, num_prompts, prompt_length):
    """The prompt that a prompt row of the packed row belongs to, and its first row."""
    prompt = row // prompt_length
    first = prompt * prompt_length
    if cu_prompts_ptr is not None:
        prompt = tl.zeros_like(row)
        first = tl.zeros_like(row)
        for number in range(1, num_prompts):
            start = tl.load(cu_prompts_ptr + number)
            prompt = tl.where(row >= start, number, prompt)
            first = tl.where(row >= start, start, first)
    return prompt, first
