"""`embed_prompt`: the input embeddings of the packed row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt.ops.registry import AUTO, check_same_device, choose_backend, define


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
    if table.ndim != 2 or prompts.ndim != 2:
        raise ValueError(
            f"table and prompts must be [V, H] and [P, H], got {list(table.shape)} and {list(prompts.shape)}"
        )
    if prompts.shape[1] != table.shape[1]:
        raise ValueError(f"prompts must be {table.shape[1]} wide like the table, got {prompts.shape[1]}")
    if token_index.ndim != 1 or token_index.shape[0] < prompts.shape[0]:
        raise ValueError(
            f"token_index must be [T] with T >= {prompts.shape[0]} prompt rows, got {list(token_index.shape)}"
        )
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, L], got shape {list(input_ids.shape)}")
    for name, tensor in (("table", table), ("prompts", prompts)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    for name, tensor in (("input_ids", input_ids), ("token_index", token_index)):
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise ValueError(f"{name} must be integers, got {tensor.dtype}")
    check_same_device(
        "embed_prompt", table=table, input_ids=input_ids, token_index=token_index, prompts=prompts
    )
    return _OP(table, input_ids, token_index, prompts, backend)


def _kernel(table: Tensor, input_ids: Tensor, token_index: Tensor, prompts: Tensor, backend: str) -> Tensor:
    chosen = choose_backend("embed_prompt", backend, table.device)
    if chosen == "triton":
        from softprompt.ops.embed_prompt.triton import embed_prompt as implementation
    elif chosen == "native":
        from softprompt.ops.embed_prompt.native import embed_prompt as implementation
    else:
        from softprompt.ops.embed_prompt.reference import embed_prompt as implementation
    return implementation(table, input_ids, token_index, prompts)


def _fake(table: Tensor, input_ids: Tensor, token_index: Tensor, prompts: Tensor, backend: str) -> Tensor:
    return table.new_empty(1, token_index.shape[0], table.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    prompts, backend = inputs[3:]
    ctx.prompt_rows, ctx.prompt_dtype, ctx.backend = prompts.shape[0], prompts.dtype, backend


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return None, None, None, _BACKWARD(grad, ctx.prompt_rows, ctx.prompt_dtype, ctx.backend), None


def _backward_kernel(grad: Tensor, prompt_rows: int, dtype: torch.dtype, backend: str) -> Tensor:
    if choose_backend("embed_prompt", backend, grad.device) == "native":
        from softprompt.ops.embed_prompt.native import embed_prompt_backward as implementation
    else:
        from softprompt.ops.embed_prompt.reference import embed_prompt_backward as implementation
    return implementation(grad, prompt_rows, dtype)


def _backward_fake(grad: Tensor, prompt_rows: int, dtype: torch.dtype, backend: str) -> Tensor:
    return grad.new_empty(prompt_rows, grad.shape[2], dtype=dtype)


_OP = define(
    "embed_prompt(Tensor table, Tensor input_ids, Tensor token_index, Tensor prompts, str backend) -> Tensor",
    _kernel,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_BACKWARD = define(
    "embed_prompt_backward(Tensor grad, SymInt prompt_rows, ScalarType dtype, str backend) -> Tensor",
    _backward_kernel,
    fake=_backward_fake,
)
