"""`prepend_prompt`: the padded twin of `embed_prompt`, for models that cannot run a packed row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softprompt.ops.registry import AUTO, check_indices, check_same_device, choose_backend, define

IGNORE_INDEX = -100


class PrependedBatch(NamedTuple):
    """What a model is given for a padded batch whose rows begin with a prompt."""

    inputs_embeds: Tensor  # [B, P + L, H] in the table's dtype
    attention_mask: Tensor  # [B, P + L] float32: ones, then the batch's own mask
    labels: Tensor  # [B, P + L] int64: -100, then the batch's own labels
    position_ids: Tensor  # [B, P + L] int64: 0 .. P + L - 1
    counts: Tensor  # [3] int32: labels that are not -100, ids out of range, labels out of range


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
    if table.ndim != 2 or prompts.ndim != 2:
        raise ValueError(
            f"table and prompts must be [V, H] and [P, H], got {list(table.shape)} and {list(prompts.shape)}"
        )
    if prompts.shape[1] != table.shape[1]:
        raise ValueError(f"prompts must be {table.shape[1]} wide like the table, got {prompts.shape[1]}")
    for name, weights in (("table", table), ("prompts", prompts)):
        if not weights.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {weights.dtype}")
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
    for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids {list(input_ids.shape)}, got {list(tensor.shape)}"
            )
    num_rows = input_ids.shape[0]
    if prompt_of_row is not None and prompt_of_row.shape != (num_rows,):
        raise ValueError(f"prompt_of_row must be [{num_rows}], got shape {list(prompt_of_row.shape)}")
    for name, tensor in (("input_ids", input_ids), ("labels", labels), ("prompt_of_row", prompt_of_row)):
        if tensor is not None and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            raise ValueError(f"{name} must be integers, got {tensor.dtype}")
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


def _kernel(
    table: Tensor,
    input_ids: Tensor,
    prompts: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    prompt_of_row: Tensor | None,
    prompt_length: int,
    backend: str,
) -> tuple[Tensor, ...]:
    if prompt_of_row is not None:
        check_indices("prompt_of_row", prompt_of_row, prompts.shape[0] // prompt_length)
    chosen = choose_backend("prepend_prompt", backend, table.device)
    if chosen == "triton":
        from softprompt.ops.prepend_prompt.triton import prepend_prompt as implementation
    elif chosen == "native":
        from softprompt.ops.prepend_prompt.native import prepend_prompt as implementation
    else:
        from softprompt.ops.prepend_prompt.reference import prepend_prompt as implementation
    return implementation(table, input_ids, prompts, attention_mask, labels, prompt_of_row, prompt_length)


def _fake(
    table: Tensor,
    input_ids: Tensor,
    prompts: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    prompt_of_row: Tensor | None,
    prompt_length: int,
    backend: str,
) -> tuple[Tensor, ...]:
    num_rows, row_length = input_ids.shape
    shape = (num_rows, prompt_length + row_length)
    return (
        table.new_empty(*shape, table.shape[1]),
        table.new_empty(shape, dtype=torch.float32),
        table.new_empty(shape, dtype=torch.int64),
        table.new_empty(shape, dtype=torch.int64),
        table.new_empty(3, dtype=torch.int32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    prompts, prompt_of_row, prompt_length, backend = inputs[2], *inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(prompt_of_row)
    ctx.prompt_length, ctx.prompt_rows, ctx.prompt_dtype = prompt_length, prompts.shape[0], prompts.dtype
    ctx.backend = backend


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    (prompt_of_row,) = ctx.saved_tensors
    d_prompts = _BACKWARD(
        grad, prompt_of_row, ctx.prompt_length, ctx.prompt_rows, ctx.prompt_dtype, ctx.backend
    )
    return None, None, d_prompts, None, None, None, None, None


def _backward_kernel(
    grad: Tensor,  # [B, P + L, H]
    prompt_of_row: Tensor | None,  # [B]
    prompt_length: int,
    prompt_rows: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    if choose_backend("prepend_prompt", backend, grad.device) == "native":
        from softprompt.ops.prepend_prompt.native import prepend_prompt_backward as implementation
    else:
        from softprompt.ops.prepend_prompt.reference import prepend_prompt_backward as implementation
    return implementation(grad, prompt_of_row, prompt_length, prompt_rows, dtype)


def _backward_fake(
    grad: Tensor,
    prompt_of_row: Tensor | None,
    prompt_length: int,
    prompt_rows: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return grad.new_empty(prompt_rows, grad.shape[2], dtype=dtype)


_OP = define(
    "prepend_prompt(Tensor table, Tensor input_ids, Tensor prompts, Tensor? attention_mask, Tensor? labels,"
    " Tensor? prompt_of_row, SymInt prompt_length, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_BACKWARD = define(
    "prepend_prompt_backward(Tensor grad, Tensor? prompt_of_row, SymInt prompt_length, SymInt prompt_rows,"
    " ScalarType dtype, str backend) -> Tensor",
    _backward_kernel,
    fake=_backward_fake,
)
