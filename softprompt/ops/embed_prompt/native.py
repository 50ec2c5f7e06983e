"""`embed_prompt` compiled: csrc/cpu/embed_prompt.cpp and csrc/cuda/embed_prompt.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt.ops.registry import declare


def embed_prompt(
    table: Tensor,  # [V, H]
    input_ids: Tensor,  # [B, L]
    token_index: Tensor,  # [T]
    prompts: Tensor,  # [ΣP, H]
) -> Tensor:
    out = torch.empty(1, token_index.shape[0], table.shape[1], dtype=table.dtype, device=table.device)
    _FORWARD(table, input_ids, token_index, prompts, out)
    return out


def embed_prompt_backward(
    grad: Tensor,  # [1, T, H]
    prompt_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """[ΣP, H]: the first rows of the gradient, as a copy."""
    d_prompts = torch.empty(prompt_rows, grad.shape[2], dtype=dtype, device=grad.device)
    _BACKWARD(grad, d_prompts)
    return d_prompts


_FORWARD = declare(
    "native_embed_prompt(Tensor table, Tensor input_ids, Tensor token_index, Tensor prompts, Tensor(a!) out)"
    " -> ()"
)
_BACKWARD = declare("native_embed_prompt_backward(Tensor grad, Tensor(a!) d_prompts) -> ()")
