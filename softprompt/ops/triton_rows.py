"""What the embedding kernels share: writing rows that come from the prompts or from the embedding table."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

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
