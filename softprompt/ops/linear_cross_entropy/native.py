"""Compiled parts of `linear_cross_entropy`: csrc/*/cross_entropy.* and, for the CPU, csrc/cpu/few_rows.*."""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt.ops.linear_cross_entropy.arguments import LossOptions
from softprompt.ops.registry import INSTRUCTIONS, declare

_MOST_ROWS = 256


def rows_loss_and_gradient_(
    logits: Tensor,  # [m, V], dense rows
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [m]
    losses: Tensor,  # [m]
    grad_losses: Tensor | None,  # [m]
    options: LossOptions,
    *,
    gradient: bool,
) -> None:
    """Writes the losses of `logits`, and `d(loss)/d(logits)` over `logits`, without other memory.

    An ignored row has the loss 0 and the gradient 0. The arguments are those of the other back ends.
    """
    bias = None if bias is None else bias.to(losses.dtype).contiguous()
    _OP(logits, bias, targets.long().contiguous(), losses, grad_losses, *options, gradient)


def serves_few_rows(rows: Tensor, weight: Tensor) -> bool:
    """Whether the two products below take [m, H] rows and a [V, H] weight, and faster than BLAS."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.stride(1) == 1
        and rows.shape[0] <= _MOST_ROWS
    )


def logits_of_few_rows(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """`out = rows @ weight.T`: [m, H] and [V, H] to [m, V], fp32, dense rows."""
    _LOGITS(rows, weight, out, INSTRUCTIONS["best"])


def d_rows_of_few_rows(d_logits: Tensor, weight: Tensor, out: Tensor) -> None:
    """`out = d_logits @ weight`: [m, V] and [V, H] to [m, H], fp32, dense rows."""
    _D_ROWS(d_logits, weight, out, INSTRUCTIONS["best"])


_OP = declare(
    "native_cross_entropy_rows(Tensor(a!) logits, Tensor? bias, Tensor targets, Tensor(b!) losses,"
    " Tensor? grad_losses, float? softcap, float logit_scale, float label_smoothing, int ignore_index,"
    " bool gradient) -> ()"
)
_LOGITS = declare(
    "native_few_rows_logits(Tensor rows, Tensor weight, Tensor(a!) logits, int instructions) -> ()"
)
_D_ROWS = declare(
    "native_few_rows_d_rows(Tensor d_logits, Tensor weight, Tensor(a!) d_rows, int instructions) -> ()"
)
