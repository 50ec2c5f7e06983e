"""From the losses of the rows to one number, in one launch on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt.ops.registry import Backends, define


def reduce_losses(
    losses: Tensor,  # [M]
    targets: Tensor,  # [M]
    *,
    num_items: int | float | Tensor | None,
    reduction: str,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """The sum, or the mean over `num_items` or the targets that are not ignored; 0 items count as 1."""
    divisor, tensor = 0.0, None
    if reduction == "sum":
        divisor = 1.0
    elif isinstance(num_items, Tensor):
        tensor = num_items
    elif num_items is not None:
        divisor = float(num_items or 1)
    reduced: Tensor = _REDUCE(losses, targets, tensor, divisor, ignore_index, backend)[0]
    return reduced


def _reduce(
    losses: Tensor,
    targets: Tensor,
    num_items: Tensor | None,
    divisor: float,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if num_items is not None and num_items.device != losses.device and num_items.device.type == "cpu":
        divisor, num_items = float(num_items.reshape(())) or 1.0, None  # waits for nothing
    # The kernel is given the divisor in fp32.
    chosen = "reference"
    if losses.dtype == torch.float32:
        chosen = _BACKENDS.chosen(backend, losses.device)
    result: tuple[Tensor, Tensor] = _BACKENDS.function(chosen)(
        losses, targets, num_items, divisor, ignore_index
    )
    return result


def _reference(
    losses: Tensor, targets: Tensor, num_items: Tensor | None, divisor: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    total = losses.sum()
    if num_items is not None:
        denominator = num_items.reshape(()).to(losses.device, losses.dtype)
        denominator = torch.where(denominator == 0, 1, denominator)
    elif divisor == 0:
        denominator = (targets != ignore_index).sum().clamp_min(1).to(losses.dtype)
    else:
        denominator = torch.full_like(total, divisor)
    return total / denominator, denominator.reciprocal()


def _reduce_fake(
    losses: Tensor,
    targets: Tensor,
    num_items: Tensor | None,
    divisor: float,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return losses.new_empty(()), losses.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.num_losses = inputs[0].shape[0]


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> dict[str, Tensor | None]:
    if grad is None:
        return {}
    (factor,) = ctx.saved_tensors
    return {"losses": (grad * factor).expand(ctx.num_losses)}


_BACKENDS = Backends(
    "linear_cross_entropy",
    _reference,
    triton="softprompt.ops.linear_cross_entropy.triton:reduce_losses",
)
_REDUCE = define(
    "linear_cross_entropy_reduce",
    _reduce,
    fake=_reduce_fake,
    backward=_backward,
    setup_context=_setup_context,
)
