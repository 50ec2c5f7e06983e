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
