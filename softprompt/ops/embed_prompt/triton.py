"""`embed_prompt` in one Triton launch."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt.ops.triton_rows import NUM_WARPS, tile_shape, write_embeddings


def embed_prompt(
    table: Tensor,  # [V, H]
    input_ids: Tensor,  # [B, L]
    token_index: Tensor,  # [T]
    prompts: Tensor,  # [ΣP, H]
) -> Tensor:
    num_rows, width = token_index.shape[0], table.shape[1]
    out = torch.empty(1, num_rows, width, dtype=table.dtype, device=table.device)
    if out.numel() == 0:
        return out
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
    return out


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
