"""`embed_prompt` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def embed_prompt(
    table: Tensor,  # [V, H]
    input_ids: Tensor,  # [B, L]
    token_index: Tensor,  # [T]
    prompts: Tensor,  # [ΣP, H]
) -> Tensor:
    out = table.new_empty(1, token_index.shape[0], table.shape[1])
    out[0, : prompts.shape[0]] = prompts
    index = token_index[prompts.shape[0] :].long()
    if input_ids.numel() == 0 or table.shape[0] == 0:
        out[0, prompts.shape[0] :] = 0
        return out
    ids = input_ids.reshape(-1)[index.clamp_min(0)]
    readable = (index >= 0) & (ids >= 0) & (ids < table.shape[0])
    rows = out[0, prompts.shape[0] :]
    torch.index_select(table, 0, torch.where(readable, ids, 0).long(), out=rows)
    rows.masked_fill_(~readable[:, None], 0)
    return out


def embed_prompt_backward(
    grad: Tensor,  # [1, T, H]
    prompt_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """[ΣP, H]: the first rows of the gradient.

    The prompt stands in the row once, so its gradient is a slice: the attention summed every text's share. A
    copy, because the slice as `prompts.grad` would keep the gradient of the whole row in memory.
    """
    return grad[0, :prompt_rows].to(dtype, copy=True)
