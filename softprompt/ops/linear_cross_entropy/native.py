"""The row function of `linear_cross_entropy` compiled: csrc/*/cross_entropy.*."""

from __future__ import annotations

from torch import Tensor

from softprompt.ops.library import declare


def rows_loss_and_gradient_(
    logits: Tensor,  # [m, V], dense rows
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [m]
    losses: Tensor,  # [m]
    grad_losses: Tensor | None,  # [m]
    *,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    ignore_index: int,
    gradient: bool,
) -> None:
    """Writes the losses of `logits`, and `d(loss)/d(logits)` over `logits`, without other memory.

    An ignored row has the loss 0 and the gradient 0. The arguments are those of the other back ends.
    """
    _OP(
        logits,
        None if bias is None else bias.to(losses.dtype).contiguous(),
        targets.long().contiguous(),
        losses,
        grad_losses,
        softcap,
        logit_scale,
        label_smoothing,
        ignore_index,
        gradient,
    )


_OP = declare(
    "native_cross_entropy_rows(Tensor(a!) logits, Tensor? bias, Tensor targets, Tensor(b!) losses,"
    " Tensor? grad_losses, float? softcap, float logit_scale, float label_smoothing, int ignore_index,"
    " bool gradient) -> ()"
)
