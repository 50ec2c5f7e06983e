"""`prepend_prompt` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt.ops.prepend_prompt.api import IGNORE_INDEX


def prepend_prompt(
    table: Tensor,  # [V, H]
    input_ids: Tensor,  # [B, L]
    prompts: Tensor,  # [ΣP, H]
    attention_mask: Tensor | None,  # [B, L]
    labels: Tensor | None,  # [B, L]
    prompt_of_row: Tensor | None,  # [B]
    prompt_length: int,
) -> tuple[Tensor, ...]:
    device = table.device
    num_rows, row_length = input_ids.shape
    vocab_size, width = table.shape
    length = prompt_length + row_length

    prompt_of_row = torch.zeros(num_rows, device=device) if prompt_of_row is None else prompt_of_row
    embeds = torch.zeros(num_rows, length, width, dtype=table.dtype, device=device)
    embeds[:, :prompt_length] = prompts.view(-1, prompt_length, width)[prompt_of_row.long()]
    ids = input_ids.long()
    known = (ids >= 0) & (ids < vocab_size)
    if vocab_size:
        text = table[torch.where(known, ids, 0)]
        embeds[:, prompt_length:] = text.masked_fill_(~known[:, :, None], 0)

    mask = torch.ones(num_rows, length, dtype=torch.float32, device=device)
    if attention_mask is not None:
        mask[:, prompt_length:] = attention_mask
    targets = torch.full((num_rows, length), IGNORE_INDEX, dtype=torch.int64, device=device)
    if labels is not None:
        targets[:, prompt_length:] = labels
    position_ids = torch.arange(length, device=device).repeat(num_rows, 1)

    scored = targets != IGNORE_INDEX
    wrong = scored & ((targets < 0) | (targets >= vocab_size))
    counts = torch.stack([scored.sum(), (~known).sum(), wrong.sum()]).int()
    return embeds, mask, targets, position_ids, counts


def prepend_prompt_backward(
    grad: Tensor,  # [B, P + L, H]
    prompt_of_row: Tensor | None,  # [B]
    prompt_length: int,
    prompt_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """[ΣP, H]: the gradient of each prompt row, summed over the rows of the batch that use it."""
    wide = torch.float64 if torch.float64 in (grad.dtype, dtype) else torch.float32
    grad = grad[:, :prompt_length]
    total = grad.new_zeros(prompt_rows // prompt_length, *grad.shape[1:], dtype=wide)
    if prompt_of_row is None:
        total[0] = grad.sum(0, dtype=wide)
    else:
        # index_add_ would add in another order at every run on a GPU; this sorts first.
        total.index_put_((prompt_of_row.long(),), grad.to(wide), accumulate=True)
    return total.flatten(0, 1).to(dtype)
