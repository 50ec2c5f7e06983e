"""`pack_layout` in plain PyTorch: the specification, and the back end where there is no kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt.ops.pack_layout.api import IGNORE_INDEX, MASKED_KEY


def pack_layout(
    attention_mask: Tensor,  # [B, L]
    labels: Tensor | None,  # [B, L]
    input_ids: Tensor | None,  # [B, L]
    prompt_of_row: Tensor | None,  # [B]
    prompt_lengths: list[int],
    vocab_size: int,
    positions: str,
    capacity: int,
    label_capacity: int,
) -> tuple[Tensor, ...]:
    device = attention_mask.device
    num_rows, row_length = attention_mask.shape
    num_prompts, prompt_tokens = len(prompt_lengths), sum(prompt_lengths)
    compact = positions == "compact"
    # Compared in their own dtype, the uint8 label 156 would be the ignore index.
    labels = None if labels is None else labels.long()
    input_ids = None if input_ids is None else input_ids.long()

    real = attention_mask != 0
    has_label = torch.zeros_like(real) if labels is None else labels != IGNORE_INDEX
    if compact:
        has_label = has_label & real
        packed = real
    else:
        packed = real.clone()
        packed[:, :-1] |= has_label[:, 1:]

    lengths = torch.tensor(prompt_lengths, device=device)
    prompt_end = lengths.cumsum(0)
    if prompt_of_row is None:
        prompt_of_row = torch.zeros(num_rows, dtype=torch.int64, device=device)
    prompt_of_row = prompt_of_row.long()
    prefix = lengths[prompt_of_row][:, None]  # [B, 1]

    column = torch.arange(row_length, device=device).expand(num_rows, row_length)
    rank = real.cumsum(1) - 1
    slot = prefix + (rank if compact else column)
    if positions == "mask":
        position = torch.where(real, prefix + rank, -1)
    else:
        position = slot
    key_slot = torch.where(real, slot, MASKED_KEY)
    row_number = torch.arange(num_rows, device=device)[:, None].expand(num_rows, row_length)

    # Columns that are not packed are scattered to a row behind the last one, which is cut off.
    order = (packed.reshape(-1).cumsum(0) - 1).view(num_rows, row_length) + prompt_tokens
    destination = torch.where(packed, order, capacity).reshape(-1)

    def row_tensor(prompt_values: Tensor, text_values: Tensor, dummy_values: Tensor | int) -> Tensor:
        out = torch.empty(capacity + 1, dtype=torch.int32, device=device)
        out[:] = dummy_values
        out[:prompt_tokens] = prompt_values
        out[destination] = text_values.reshape(-1).int()
        return out[:capacity]

    prompt_number = torch.arange(num_prompts, device=device).repeat_interleave(
        lengths, output_size=prompt_tokens
    )
    within_prompt = torch.arange(prompt_tokens, device=device) - (prompt_end - lengths)[prompt_number]
    no_token = torch.full_like(within_prompt, -1)
    dummy_segment = num_prompts + num_rows + torch.arange(capacity + 1, device=device)

    token_index = row_tensor(no_token, row_number * row_length + column, -1)
    position_ids = row_tensor(within_prompt, position, 0)
    query_position = row_tensor(within_prompt, slot, 0)
    key_position = row_tensor(within_prompt, key_slot, 0)
    segments = row_tensor(prompt_number, num_prompts + row_number, dummy_segment)
    prefix_id = row_tensor(prompt_number, prompt_of_row[:, None].expand_as(column), dummy_segment)

    text_lengths = packed.sum(1)
    cu_texts = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
    torch.cumsum(text_lengths, 0, out=cu_texts[1:])
    cu_texts += prompt_tokens

    # The packed row of the previous token: the running maximum of the packed columns before this one.
    last_of_prompt = (prompt_end[prompt_of_row] - 1)[:, None]
    previous = torch.cat([last_of_prompt, torch.where(packed, order, -1)[:, :-1]], 1).cummax(1).values
    previous = torch.maximum(previous[:, :row_length], last_of_prompt)
    label_order = (has_label.reshape(-1).cumsum(0) - 1).view(num_rows, row_length)
    label_destination = torch.where(has_label, label_order, label_capacity).reshape(-1)
    label_rows = torch.zeros(label_capacity + 1, dtype=torch.int32, device=device)
    label_rows[label_destination] = previous.reshape(-1).int()
    label_targets = torch.full((label_capacity + 1,), IGNORE_INDEX, dtype=torch.int32, device=device)
    if labels is not None:
        label_targets[label_destination] = labels.reshape(-1).int()

    out_of_range = torch.zeros((), dtype=torch.int64, device=device)
    if input_ids is not None:
        out_of_range = out_of_range + ((input_ids < 0) | (input_ids >= vocab_size)).sum()
    if labels is not None:
        out_of_range = (
            out_of_range + ((labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab_size))).sum()
        )
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    counts = torch.stack(
        [
            text_lengths.sum(),
            has_label.sum(),
            out_of_range,
            torch.cat([text_lengths, zero]).max(),
            torch.cat([text_lengths + prefix[:, 0], zero]).max(),
        ]
    )
    return (
        token_index,
        position_ids,
        query_position,
        key_position,
        segments,
        prefix_id,
        cu_texts.int(),
        label_rows[:label_capacity],
        label_targets[:label_capacity],
        counts.int(),
    )
