"""`embed_prompt` and `prepend_prompt` in one Triton launch each: rows from prompts and an embedding table."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt.ops import constants
from softprompt.ops.prepend_prompt import Rows

IGNORE_INDEX = tl.constexpr(constants.IGNORE_INDEX)
COUNTED = 512
NUM_WARPS = 4
TILE_BYTES = 4096
NARROWEST_BYTES = 256


def tile_shape(width: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns (powers of two) that one program writes of rows of `width` entries.

    A tile is 4 KiB, 32 bytes for each thread of four warps: two 16-byte stores. A number of columns that
    divides the width leaves no thread idle (256 for a width of 2,304), as long as a row of the tile is still
    256 bytes.
    """
    entries = TILE_BYTES // itemsize
    divisor = width & -width
    columns = divisor if divisor * itemsize >= NARROWEST_BYTES else triton.next_power_of_2(width)
    columns = min(columns, entries)
    return entries // columns, columns


@triton.jit
def write_embeddings(
    table_ptr,  # [V, H]
    prompts_ptr,  # [ΣP, H]
    out_ptr,  # [rows, H], contiguous
    out_rows,  # rows of the tile
    columns,  # columns of the tile
    is_prompt,  # which rows are the prompt's
    prompt_rows,  # the row of prompts_ptr of those
    ids,  # int64 ids of the other rows
    num_rows,
    num_prompt_rows,
    vocab_size,
    width,
    table_row_stride,
    table_column_stride,
    prompts_row_stride,
    prompts_column_stride,
):
    """Writes a tile of `out`; a row that has neither a prompt row nor an id inside the table is zero."""
    inside = (columns < width)[None, :]
    from_prompt = is_prompt & (prompt_rows >= 0) & (prompt_rows < num_prompt_rows)
    from_table = ~is_prompt & (ids >= 0) & (ids < vocab_size)
    columns = columns.to(tl.int64)[None, :]
    prompt = tl.load(
        prompts_ptr
        + prompt_rows.to(tl.int64)[:, None] * prompts_row_stride
        + columns * prompts_column_stride,
        mask=from_prompt[:, None] & inside,
        other=0.0,
    )
    text = tl.load(
        table_ptr + ids.to(tl.int64)[:, None] * table_row_stride + columns * table_column_stride,
        mask=from_table[:, None] & inside,
        other=0.0,
    )
    # Through fp32, as PyTorch narrows fp64 to 16 bits; a wider type than fp32 is only met as the table's own.
    if prompt.dtype != text.dtype:
        prompt = prompt.to(tl.float32).to(text.dtype)
    rows = tl.where(is_prompt[:, None], prompt, text)
    tl.store(
        out_ptr + out_rows.to(tl.int64)[:, None] * width + columns,
        rows,
        mask=(out_rows < num_rows)[:, None] & inside,
    )


def embed_prompt(table: Tensor, input_ids: Tensor, token_index: Tensor, prompts: Tensor, out: Tensor) -> None:
    num_rows, width = token_index.shape[0], table.shape[1]
    if out.numel() == 0:
        return
    rows, columns = tile_shape(width, table.element_size())
    with torch.cuda.device_of(table):
        _embed_prompt[(triton.cdiv(num_rows, rows), triton.cdiv(width, columns))](
            table,
            input_ids,
            token_index,
            prompts,
            out,
            num_rows,
            prompts.shape[0],
            input_ids.numel(),
            input_ids.shape[1],
            table.shape[0],
            width,
            *table.stride(),
            *input_ids.stride(),
            token_index.stride(0),
            *prompts.stride(),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=NUM_WARPS,
        )


# Grid: (row blocks, column blocks). A program writes ROWS packed rows and COLUMNS of their H entries.
# Moves: every row is read once and written once; the ids are read once for each column block.
@triton.jit(
    do_not_specialize=["num_rows", "num_prompt_rows", "num_ids", "row_length", "vocab_size", "ids_row_stride"]
)
def _embed_prompt(
    table_ptr,  # [V, H]
    ids_ptr,  # [B, L]
    token_index_ptr,  # [T]
    prompts_ptr,  # [ΣP, H]
    out_ptr,  # [T, H]
    num_rows,
    num_prompt_rows,
    num_ids,
    row_length,
    vocab_size,
    width,
    table_row_stride,
    table_column_stride,
    ids_row_stride,
    ids_column_stride,
    token_index_stride,
    prompts_row_stride,
    prompts_column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_prompt = rows < num_prompt_rows
    is_token = ~is_prompt & (rows < num_rows)
    index_pointers = token_index_ptr + rows.to(tl.int64) * token_index_stride
    index = tl.load(index_pointers, mask=is_token, other=-1)
    has_id = (index >= 0) & (index < num_ids)
    index = tl.where(has_id, index, 0)
    row_length = tl.maximum(row_length, 1)
    row, column = (index // row_length).to(tl.int64), (index % row_length).to(tl.int64)
    ids = tl.load(ids_ptr + row * ids_row_stride + column * ids_column_stride, mask=has_id, other=0).to(
        tl.int64
    )
    write_embeddings(
        table_ptr,
        prompts_ptr,
        out_ptr,
        rows,
        columns,
        is_prompt,
        rows,
        tl.where(has_id, ids, -1),
        num_rows,
        num_prompt_rows,
        vocab_size,
        width,
        table_row_stride,
        table_column_stride,
        prompts_row_stride,
        prompts_column_stride,
    )


def prepend_prompt(
    table: Tensor,  # [V, H]
    input_ids: Tensor,  # [B, L]
    prompts: Tensor,  # [ΣP, H]
    batch: Rows,
    prompt_length: int,
    *out: Tensor,  # PrependedBatch
) -> None:
    num_rows, row_length = input_ids.shape
    vocab_size, width = table.shape
    mask = batch.attention_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    rows, columns = tile_shape(max(1, width), table.element_size())
    column_blocks = max(1, triton.cdiv(width, columns))
    row_blocks = triton.cdiv(num_rows * (prompt_length + row_length), rows)
    with torch.cuda.device_of(table):
        _prepend_prompt[(1 + row_blocks * column_blocks,)](
            table,
            input_ids,
            prompts,
            mask,
            batch.labels,
            batch.prompt_of_row,
            *out,
            num_rows,
            row_length,
            prompt_length,
            prompts.shape[0],
            vocab_size,
            width,
            column_blocks,
            *table.stride(),
            *input_ids.stride(),
            *prompts.stride(),
            *((0, 0) if mask is None else mask.stride()),
            *((0, 0) if batch.labels is None else batch.labels.stride()),
            0 if batch.prompt_of_row is None else batch.prompt_of_row.stride(0),
            ROWS=rows,
            COLUMNS=columns,
            COUNTED=COUNTED,
            num_warps=NUM_WARPS,
        )


# Grid: 1 + row blocks * column blocks. Program 0 counts the labels and ids of the whole batch, so that no
# counter has to be set to zero before the launch. Every other program writes a tile of ROWS of the B (P + L)
# rows and COLUMNS of their H entries; those of the first column block also write mask, labels and positions.
# Moves: every embedding is read once and written once, and 20 bytes are written for each row.
@triton.jit(
    do_not_specialize=[
        "num_rows",
        "row_length",
        "prompt_length",
        "num_prompt_rows",
        "vocab_size",
        "column_blocks",
        "ids_row_stride",
        "mask_row_stride",
        "labels_row_stride",
    ]
)
def _prepend_prompt(
    table_ptr,  # [V, H]
    ids_ptr,  # [B, L]
    prompts_ptr,  # [ΣP, H]
    mask_ptr,  # [B, L] or None
    labels_ptr,  # [B, L] or None
    prompt_of_row_ptr,  # [B] or None
    embeds_ptr,  # [B, P + L, H]
    out_mask_ptr,  # [B, P + L]
    out_labels_ptr,  # [B, P + L]
    position_ids_ptr,  # [B, P + L]
    counts_ptr,  # [3]
    num_rows,
    row_length,
    prompt_length,
    num_prompt_rows,
    vocab_size,
    width,
    column_blocks,
    table_row_stride,
    table_column_stride,
    ids_row_stride,
    ids_column_stride,
    prompts_row_stride,
    prompts_column_stride,
    mask_row_stride,
    mask_column_stride,
    labels_row_stride,
    labels_column_stride,
    prompt_of_row_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COUNTED: tl.constexpr,
):
    tile = tl.program_id(0) - 1
    if tile < 0:
        scored = tl.full([COUNTED], 0, tl.int32)
        wrong_ids = tl.full([COUNTED], 0, tl.int32)
        wrong_labels = tl.full([COUNTED], 0, tl.int32)
        for start in range(0, num_rows * row_length, COUNTED):
            entry = start + tl.arange(0, COUNTED)
            inside = entry < num_rows * row_length
            row, column = (entry // row_length).to(tl.int64), entry % row_length
            token = tl.load(ids_ptr + row * ids_row_stride + column * ids_column_stride, mask=inside, other=0)
            token = token.to(tl.int64)
            wrong_ids += (inside & ((token < 0) | (token >= vocab_size))).to(tl.int32)
            if labels_ptr is not None:
                pointers = labels_ptr + row * labels_row_stride + column * labels_column_stride
                label = tl.load(pointers, mask=inside, other=0).to(tl.int64)
                is_scored = inside & (label != IGNORE_INDEX)
                scored += is_scored.to(tl.int32)
                wrong_labels += (is_scored & ((label < 0) | (label >= vocab_size))).to(tl.int32)
        tl.store(counts_ptr, tl.sum(scored))
        tl.store(counts_ptr + 1, tl.sum(wrong_ids))
        tl.store(counts_ptr + 2, tl.sum(wrong_labels))
    else:
        length = prompt_length + row_length
        out_rows = (tile // column_blocks) * ROWS + tl.arange(0, ROWS)
        columns = (tile % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
        inside = out_rows < num_rows * length
        row, place = (out_rows // length).to(tl.int64), out_rows % length
        column = place - prompt_length
        is_text = inside & (column >= 0)
        prompt = tl.full([ROWS], 0, tl.int64)
        if prompt_of_row_ptr is not None:
            prompt = tl.load(prompt_of_row_ptr + row * prompt_of_row_stride, mask=inside, other=0).to(
                tl.int64
            )
        ids = tl.load(ids_ptr + row * ids_row_stride + column * ids_column_stride, mask=is_text, other=0)
        write_embeddings(
            table_ptr,
            prompts_ptr,
            embeds_ptr,
            out_rows,
            columns,
            inside & (column < 0),
            prompt * prompt_length + place,
            ids.to(tl.int64),
            num_rows * length,
            num_prompt_rows,
            vocab_size,
            width,
            table_row_stride,
            table_column_stride,
            prompts_row_stride,
            prompts_column_stride,
        )
        if tile % column_blocks == 0:
            mask = tl.full([ROWS], 1.0, tl.float32)
            if mask_ptr is not None:
                pointers = mask_ptr + row * mask_row_stride + column * mask_column_stride
                mask = tl.where(is_text, tl.load(pointers, mask=is_text, other=0).to(tl.float32), mask)
            tl.store(out_mask_ptr + out_rows, mask, mask=inside)
            label = tl.full([ROWS], IGNORE_INDEX, tl.int64)
            if labels_ptr is not None:
                pointers = labels_ptr + row * labels_row_stride + column * labels_column_stride
                label = tl.where(is_text, tl.load(pointers, mask=is_text, other=0).to(tl.int64), label)
            tl.store(out_labels_ptr + out_rows, label, mask=inside)
            tl.store(position_ids_ptr + out_rows, place.to(tl.int64), mask=inside)
