"""`prepend_prompt`: the padded twin of `embed_prompt`, for models that cannot run a packed row.

Prompts in front of every row of a padded batch: embeddings, mask, labels and positions in one pass. Compiled
in csrc/cpu/prepend_prompt.cpp and csrc/cuda/prepend_prompt.cu, in Triton in `triton_rows.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softprompt.ops.checks import (
    check_indices,
    check_integers,
    check_same_device,
    check_shape_of,
    check_table_and_prompts,
)
from softprompt.ops.constants import IGNORE_INDEX
from softprompt.ops.registry import AUTO, Backends, declare, define_filled

__all__ = ["PrependedBatch", "prepend_prompt"]


class PrependedBatch(NamedTuple):
    """What a model is given for a padded batch whose rows begin with a prompt."""

    inputs_embeds: Tensor  # [B, P + L, H] in the table's dtype
    attention_mask: Tensor  # [B, P + L] float32: ones, then the batch's own mask
    labels: Tensor  # [B, P + L] int64: -100, then the batch's own labels
    position_ids: Tensor  # [B, P + L] int64: 0 .. P + L - 1
    counts: Tensor  # [3] int32: labels that are not -100, ids out of range, labels out of range


class Rows(NamedTuple):
    """What the rows of a padded batch have beside their ids."""

    attention_mask: Tensor | None  # [B, L]
    labels: Tensor | None  # [B, L]
    prompt_of_row: Tensor | None  # [B]


def prepend_prompt(
    table: Tensor,  # [V, H]
    input_ids: Tensor,  # [B, L]
    prompts: Tensor,  # [ΣP, H]
    prompt_lengths: Sequence[int],  # [K]
    *,
    attention_mask: Tensor | None = None,  # [B, L]
    labels: Tensor | None = None,  # [B, L]
    prompt_of_row: Tensor | None = None,  # [B]
    backend: str = AUTO,
) -> PrependedBatch:
    """Puts a prompt in front of every row: `[prompts[k], table[input_ids[b]]]` with k the prompt of row b.

    Mask, labels and positions are those that PEFT's `PromptTuningConfig` model makes: a float mask that
    begins with ones, labels that begin with -100, positions that count from the first virtual token. Every
    label is predicted by the position before it, so the number that is scored is the number of labels that
    are not -100.

    Args:
        table: [V, H] embedding weights of any floating dtype. It gets no gradient.
        input_ids: [B, L] integers; an id outside 0 .. V-1 is counted and its embedding is zero.
        prompts: [ΣP, H], usually fp32: K prompts of P rows, one after the other. The gradient of a prompt is
            the sum over the rows that use it, taken in fp32 (fp64 where the gradient or the prompts are fp64)
            and given in the dtype of the prompts.
        prompt_lengths: P, once for each of the K prompts: a padded batch has no room for different lengths.
        attention_mask: [B, L] of any integer, bool or float dtype. None: ones.
        labels: [B, L] integers, -100 = no label; another one outside 0 .. V-1 is counted. None: no labels.
        prompt_of_row: [B] integers in 0 .. K-1: the prompt of each row. None: prompt 0.
        backend: "auto", "reference", "triton" or "native".

    Raises:
        ValueError: prompts of another width than the table, lengths that differ or do not add up to the
            prompt rows, shapes and dtypes that do not fit.
        IndexError: on a CPU, a prompt_of_row outside 0 .. K-1.
    """
    check_table_and_prompts(table, prompts)
    lengths = [int(length) for length in prompt_lengths]
    if not lengths or lengths[0] < 1 or len(set(lengths)) > 1:
        raise ValueError(
            f"prompt_lengths must be equal and at least 1 (a padded batch has one length), got {lengths}"
        )
    if sum(lengths) != prompts.shape[0]:
        raise ValueError(
            f"prompts must have {sum(lengths)} rows (the sum of prompt_lengths), got {prompts.shape[0]}"
        )
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, L], got shape {list(input_ids.shape)}")
    check_shape_of("input_ids", input_ids.shape, attention_mask=attention_mask, labels=labels)
    num_rows = input_ids.shape[0]
    if prompt_of_row is not None and prompt_of_row.shape != (num_rows,):
        raise ValueError(f"prompt_of_row must be [{num_rows}], got shape {list(prompt_of_row.shape)}")
    check_integers(input_ids=input_ids, labels=labels, prompt_of_row=prompt_of_row)
    check_same_device(
        "prepend_prompt",
        table=table,
        input_ids=input_ids,
        prompts=prompts,
        attention_mask=attention_mask,
        labels=labels,
        prompt_of_row=prompt_of_row,
    )
    return PrependedBatch(
        *_OP(table, input_ids, prompts, attention_mask, labels, prompt_of_row, lengths[0], backend)
    )


def reference(
    table: Tensor,  # [V, H]
    input_ids: Tensor,  # [B, L]
    prompts: Tensor,  # [ΣP, H]
    batch: Rows,
    prompt_length: int,
) -> PrependedBatch:
    """The op in plain PyTorch."""
    device = table.device
    num_rows, row_length = input_ids.shape
    vocab_size, width = table.shape
    length = prompt_length + row_length

    of_row = torch.zeros(num_rows, device=device) if batch.prompt_of_row is None else batch.prompt_of_row
    embeds = torch.zeros(num_rows, length, width, dtype=table.dtype, device=device)
    embeds[:, :prompt_length] = prompts.view(-1, prompt_length, width)[of_row.long()]
    ids = input_ids.long()
    known = (ids >= 0) & (ids < vocab_size)
    if vocab_size:
        text = table[torch.where(known, ids, 0)]
        embeds[:, prompt_length:] = text.masked_fill_(~known[:, :, None], 0)

    mask = torch.ones(num_rows, length, dtype=torch.float32, device=device)
    if batch.attention_mask is not None:
        mask[:, prompt_length:] = batch.attention_mask
    targets = torch.full((num_rows, length), IGNORE_INDEX, dtype=torch.int64, device=device)
    if batch.labels is not None:
        targets[:, prompt_length:] = batch.labels
    position_ids = torch.arange(length, device=device).repeat(num_rows, 1)

    scored = targets != IGNORE_INDEX
    wrong = scored & ((targets < 0) | (targets >= vocab_size))
    counts = torch.stack([scored.sum(), (~known).sum(), wrong.sum()]).int()
    return PrependedBatch(embeds, mask, targets, position_ids, counts)


def reference_backward(
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


def _allocate(
    table: Tensor, input_ids: Tensor, prompts: Tensor, batch: Rows, prompt_length: int
) -> PrependedBatch:
    shape = (input_ids.shape[0], prompt_length + input_ids.shape[1])
    return PrependedBatch(
        table.new_empty(*shape, table.shape[1]),
        table.new_empty(shape, dtype=torch.float32),
        table.new_empty(shape, dtype=torch.int64),
        table.new_empty(shape, dtype=torch.int64),
        table.new_empty(3, dtype=torch.int32),
    )


def _allocate_backward(
    grad: Tensor, prompt_of_row: Tensor | None, prompt_length: int, prompt_rows: int, dtype: torch.dtype
) -> Tensor:
    return grad.new_empty(prompt_rows, grad.shape[2], dtype=dtype)


def _check(table: Tensor, input_ids: Tensor, prompts: Tensor, batch: Rows, prompt_length: int) -> None:
    if batch.prompt_of_row is not None:
        check_indices("prompt_of_row", batch.prompt_of_row, prompts.shape[0] // prompt_length)


def _setup_context(ctx: Any, inputs: list[Any], output: tuple[Tensor, ...]) -> None:
    _, _, prompts, batch, ctx.prompt_length, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(batch.prompt_of_row)
    ctx.prompt_rows, ctx.prompt_dtype = prompts.shape[0], prompts.dtype


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> dict[str, Tensor | None]:
    if grad is None:
        return {}
    (prompt_of_row,) = ctx.saved_tensors
    sizes = ctx.prompt_length, ctx.prompt_rows, ctx.prompt_dtype
    return {"prompts": _BACKWARD(grad, prompt_of_row, *sizes, ctx.backend)}


_NATIVE = declare(
    "native_prepend_prompt(Tensor table, Tensor input_ids, Tensor prompts, Tensor? attention_mask,"
    " Tensor? labels, Tensor? prompt_of_row, int prompt_length, Tensor(a!) embeds, Tensor(b!) mask,"
    " Tensor(c!) targets, Tensor(d!) position_ids, Tensor(e!) counts) -> ()"
)
_NATIVE_BACKWARD = declare(
    "native_prepend_prompt_backward(Tensor grad, Tensor? prompt_of_row, int prompt_length,"
    " Tensor(a!) d_prompts) -> ()"
)
_OP = define_filled(
    "prepend_prompt",
    Backends(
        "prepend_prompt",
        reference,
        native=lambda table, ids, prompts, batch, *rest: _NATIVE(table, ids, prompts, *batch, *rest),
        triton="softprompt.ops.triton_rows:prepend_prompt",
    ),
    _allocate,
    check=_check,
    backward=_backward,
    setup_context=_setup_context,
)
_BACKWARD = define_filled(
    "prepend_prompt_backward",
    Backends(
        "prepend_prompt",
        reference_backward,
        native=lambda grad, of_row, length, rows, dtype, out: _NATIVE_BACKWARD(grad, of_row, length, out),
    ),
    _allocate_backward,
)
