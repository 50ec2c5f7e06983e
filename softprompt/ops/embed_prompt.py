"""`embed_prompt`: the input embeddings of the packed row, by lookup, cast and concatenation in one pass.

Compiled in csrc/cpu/embed_prompt.cpp and csrc/cuda/embed_prompt.cu, in Triton in `triton_rows.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt.ops.checks import check_integers, check_same_device, check_table_and_prompts
from softprompt.ops.registry import AUTO, Backends, declare, define_filled, differentiable_once

__all__ = ["embed_prompt"]


def embed_prompt(
    table: Tensor,  # [V, H]
    input_ids: Tensor,  # [B, L]
    token_index: Tensor,  # [T]
    prompts: Tensor,  # [ΣP, H]
    *,
    backend: str = AUTO,
) -> Tensor:
    """Gathers, casts and concatenates: `out[0, t] = prompts[t]` for t < ΣP, then the tokens' embeddings.

    Row t >= ΣP is `table[input_ids.flatten()[token_index[t]]]`, or zeros where `token_index[t]` is negative
    (a dummy token) or the id is outside 0 .. V-1: the table is never read out of bounds.

    Args:
        table: [V, H] embedding weights of any floating dtype. It gets no gradient.
        input_ids: [B, L] integers.
        token_index: [T] integers, `LayoutTensors.token_index`; its first ΣP entries are not read.
        prompts: [ΣP, H], usually fp32; its gradient has its own dtype and is taken from the first ΣP rows.
        backend: "auto", "reference", "triton" or "native".

    Returns:
        [1, T, H] in the table's dtype.

    Raises:
        ValueError: prompts of another width than the table, more prompt rows than the row has, wrong ranks or
            dtypes.
    """
    check_table_and_prompts(table, prompts)
    if token_index.ndim != 1 or token_index.shape[0] < prompts.shape[0]:
        raise ValueError(
            f"token_index must be [T] with T >= {prompts.shape[0]} prompt rows, got {list(token_index.shape)}"
        )
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, L], got shape {list(input_ids.shape)}")
    check_integers(input_ids=input_ids, token_index=token_index)
    check_same_device(
        "embed_prompt", table=table, input_ids=input_ids, token_index=token_index, prompts=prompts
    )
    embeds: Tensor = _OP(table, input_ids, token_index, prompts, backend)
    return embeds


def reference(table: Tensor, input_ids: Tensor, token_index: Tensor, prompts: Tensor) -> Tensor:
    """The op in plain PyTorch."""
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


def reference_backward(grad: Tensor, prompt_rows: int, dtype: torch.dtype) -> Tensor:
    """[1, T, H] to [ΣP, H]: the first rows of the gradient.

    The prompt stands in the row once, so its gradient is a slice: the attention summed every text's share. A
    copy, because the slice as `prompts.grad` would keep the gradient of the whole row in memory.
    """
    return grad[0, :prompt_rows].to(dtype, copy=True)


def _allocate(table: Tensor, input_ids: Tensor, token_index: Tensor, prompts: Tensor) -> Tensor:
    return table.new_empty(1, token_index.shape[0], table.shape[1])


def _allocate_backward(grad: Tensor, prompt_rows: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(prompt_rows, grad.shape[2], dtype=dtype)


def _setup_context(ctx: Any, inputs: list[Any], output: Tensor) -> None:
    prompts, ctx.backend = inputs[3:]
    ctx.prompt_rows, ctx.prompt_dtype = prompts.shape[0], prompts.dtype


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor | None]:
    return {"prompts": _BACKWARD(grad, ctx.prompt_rows, ctx.prompt_dtype, ctx.backend)}


_NATIVE_BACKWARD = declare("native_embed_prompt_backward(Tensor grad, Tensor(a!) d_prompts) -> ()")
_OP = define_filled(
    "embed_prompt",
    Backends(
        "embed_prompt",
        reference,
        native=declare(
            "native_embed_prompt(Tensor table, Tensor input_ids, Tensor token_index, Tensor prompts,"
            " Tensor(a!) out) -> ()"
        ),
        triton="softprompt.ops.triton_rows:embed_prompt",
    ),
    _allocate,
    backward=_backward,
    setup_context=_setup_context,
)
_BACKWARD = define_filled(
    "embed_prompt_backward",
    Backends(
        "embed_prompt",
        reference_backward,
        native=lambda grad, prompt_rows, dtype, d_prompts: _NATIVE_BACKWARD(grad, d_prompts),
    ),
    _allocate_backward,
    backward=differentiable_once("embed_prompt"),
)
