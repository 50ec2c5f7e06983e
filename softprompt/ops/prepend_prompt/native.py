"""`prepend_prompt` compiled: csrc/cpu/prepend_prompt.cpp and csrc/cuda/prepend_prompt.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt.ops.registry import declare


def prepend_prompt(
    table: Tensor,  # [V, H]
    input_ids: Tensor,  # [B, L]
    prompts: Tensor,  # [ΣP, H]
    attention_mask: Tensor | None,  # [B, L]
    labels: Tensor | None,  # [B, L]
    prompt_of_row: Tensor | None,  # [B]
    prompt_length: int,
) -> tuple[Tensor, ...]:
    shape, device = (input_ids.shape[0], prompt_length + input_ids.shape[1]), table.device
    outputs = (
        torch.empty(*shape, table.shape[1], dtype=table.dtype, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.int64, device=device),
        torch.empty(shape, dtype=torch.int64, device=device),
        torch.empty(3, dtype=torch.int32, device=device),
    )
    _FORWARD(table, input_ids, prompts, attention_mask, labels, prompt_of_row, prompt_length, *outputs)
    return outputs


def prepend_prompt_backward(
    grad: Tensor,  # [B, P + L, H]
    prompt_of_row: Tensor | None,  # [B]
    prompt_length: int,
    prompt_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """[ΣP, H]: the gradient of each prompt row, summed over the rows of the batch that use it."""
    d_prompts = torch.empty(prompt_rows, grad.shape[2], dtype=dtype, device=grad.device)
    _BACKWARD(grad, prompt_of_row, prompt_length, d_prompts)
    return d_prompts


_FORWARD = declare(
    "native_prepend_prompt(Tensor table, Tensor input_ids, Tensor prompts, Tensor? attention_mask,"
    " Tensor? labels, Tensor? prompt_of_row, int prompt_length, Tensor(a!) embeds, Tensor(b!) mask,"
    " Tensor(c!) targets, Tensor(d!) position_ids, Tensor(e!) counts) -> ()"
)
_BACKWARD = declare(
    "native_prepend_prompt_backward(Tensor grad, Tensor? prompt_of_row, int prompt_length,"
    " Tensor(a!) d_prompts) -> ()"
)
