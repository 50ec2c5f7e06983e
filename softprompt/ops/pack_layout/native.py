"""`pack_layout` compiled: csrc/cpu/pack_layout.cpp and csrc/cuda/pack_layout.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt.ops.pack_layout.api import prompt_offsets
from softprompt.ops.registry import declare


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
    sizes = (*[capacity] * 6, attention_mask.shape[0] + 1, label_capacity, label_capacity, 5)
    outputs = tuple(torch.empty(size, dtype=torch.int32, device=attention_mask.device) for size in sizes)
    _OP(
        attention_mask,
        labels,
        input_ids,
        prompt_of_row,
        prompt_offsets(tuple(prompt_lengths), attention_mask.device),
        vocab_size,
        positions == "compact",
        positions == "slots",
        *outputs,
    )
    return outputs


_OP = declare(
    "native_pack_layout(Tensor attention_mask, Tensor? labels, Tensor? input_ids, Tensor? prompt_of_row,"
    " Tensor cu_prompts, int vocab_size, bool compact, bool by_slot, Tensor(a!) token_index,"
    " Tensor(b!) position_ids, Tensor(c!) query_position, Tensor(d!) key_position, Tensor(e!) segments,"
    " Tensor(f!) prefix_id,"
    " Tensor(g!) cu_texts, Tensor(h!) label_rows, Tensor(i!) label_targets, Tensor(j!) counts) -> ()"
)
