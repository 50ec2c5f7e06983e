"""`prepend_prompt` in one Triton launch."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt.ops.prepend_prompt import api
from softprompt.ops.triton_rows import NUM_WARPS, tile_shape, write_embeddings

IGNORE_INDEX = tl.constexpr(api.IGNORE_INDEX)
COUNTED = 512


def prepend_prompt(
    table: Tensor,  # [V, H]
    input_ids: Tensor,  # [B, L]
    prompts: Tensor,  # [ΣP, H]
    attention_mask: Tensor | None,  # [B, L]
    labels: Tensor | None,  # [B, L]
    prompt_of_row: Tensor | None,  # [B]
    prompt_length: int,
) -> tuple[Tensor, ...]:
    num_rows, row_length = input_ids.shape
    vocab_size, width = table.shape
    shape = (num_rows, prompt_length + row_length)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = attention_mask.view(torch.uint8)

    embeds = torch.empty(*shape, width, dtype=table.dtype, device=table.device)
    mask = torch.empty(shape, dtype=torch.float32, device=table.device)
    targets = torch.empty(shape, dtype=torch.int64, device=table.device)
    position_ids = torch.empty(shape, dtype=torch.int64, device=table.device)
    counts = torch.empty(3, dtype=torch.int32, device=table.device)

    rows, columns = tile_shape(max(1, width), table.element_size())
    column_blocks = max(1, triton.cdiv(width, columns))
    row_blocks = triton.cdiv(shape[0] * shape[1], rows)
    with torch.cuda.device_of(table):
        _prepend_prompt[(1 + row_blocks * column_blocks,)](
            table,
            input_ids,
            prompts,
            attention_mask,
            labels,
            prompt_of_row,
            embeds,
            mask,
            targets,
            position_ids,
            counts,
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
            *((0, 0) if attention_mask is None else attention_mask.stride()),
            *((0, 0) if labels is None else labels.stride()),
            0 if prompt_of_row is None else prompt_of_row.stride(0),
            ROWS=rows,
            COLUMNS=columns,
            COUNTED=COUNTED,
            num_warps=NUM_WARPS,
        )
    return embeds, mask, targets, position_ids, counts


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
