"""The row function of `linear_cross_entropy` in plain PyTorch, and the whole op written down."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from softprompt.ops.constants import IGNORE_INDEX
from softprompt.ops.linear_cross_entropy.arguments import LossOptions

# Rows are walked in tiles that stay in a CPU's last-level cache from one elementwise pass to the next; on
# other devices a launch costs more than a trip to memory.
_CPU_TILE_BYTES = 8 << 20
_TILE_BYTES = 64 << 20


def linear_cross_entropy_ref(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    label_rows: Tensor | None,  # [M]
    targets: Tensor,  # [M], or [T] without label_rows
    *,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    num_items: int | float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """What `linear_cross_entropy` computes, written down: gather, `linear`, scale, softcap, `cross_entropy`.

    Materialises the [M, V] logits in the dtype of the weight and in fp32. Differentiable any number of times.
    All targets ignored gives NaN for the mean, as PyTorch does.
    """
    rows = hidden if label_rows is None else hidden[label_rows]
    logits = functional.linear(rows, weight, bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if logit_scale is not None:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = functional.cross_entropy(
        logits,
        targets.long(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction if num_items is None else "sum",
    )
    return loss if num_items is None else loss / num_items


def rows_loss_and_gradient_(
    logits: Tensor,  # [m, V]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [m]
    losses: Tensor,  # [m]
    grad_losses: Tensor | None,  # [m]
    options: LossOptions,
    *,
    gradient: bool,
) -> None:
    """Writes the losses of `logits`, and `d(loss)/d(logits)` over `logits`.

    Args:
        logits: [m, V] products of hidden rows and weight, before bias, scale and softcap; overwritten.
        bias: [V].
        targets: [m]; a target outside the vocabulary gives NaN.
        losses: [m] fp32 or fp64: the dtype of the arithmetic; overwritten.
        grad_losses: [m] factors of the gradient. None: 1.
        options: see `linear_cross_entropy`.
        gradient: False leaves no useful values in `logits`.
    """
    softcap, logit_scale, label_smoothing, ignore_index = options
    num_rows, vocab_size = logits.shape
    budget = _CPU_TILE_BYTES if logits.device.type == "cpu" else _TILE_BYTES
    tile_rows = max(1, budget // (vocab_size * losses.element_size()))
    for start in range(0, num_rows, tile_rows):
        rows = slice(start, min(start + tile_rows, num_rows))
        tile = logits[rows].to(losses.dtype)  # fp32 and fp64 logits themselves, a copy of narrower ones
        if bias is not None:
            tile += bias
        if logit_scale != 1:
            tile *= logit_scale
        slope = None
        if softcap is not None:
            tile.mul_(1 / softcap).tanh_()
            slope = (1 - tile.square()) if gradient else None
            tile *= softcap

        target = targets[rows].long()
        ignored = target == ignore_index
        known = (target >= 0) & (target < vocab_size)
        column = torch.where(known & ~ignored, target, 0)[:, None]
        tile -= tile.amax(1, keepdim=True)
        loss = -tile.gather(1, column).squeeze(1)
        if label_smoothing:
            loss = torch.lerp(loss, -tile.mean(1), label_smoothing)
        total = tile.exp_().sum(1)
        loss = torch.where(known, loss + total.log(), math.nan)
        losses[rows] = loss.masked_fill(ignored, 0)
        if not gradient:
            continue

        factor = logit_scale / total
        off = label_smoothing / vocab_size
        if off:
            tile -= off * total[:, None]
        tile.scatter_add_(1, column, (label_smoothing - 1) * total[:, None])
        if grad_losses is not None:
            factor = factor * grad_losses[rows]
        tile *= factor[:, None]
        if slope is not None:
            tile *= slope
        if logits.device.type != "cpu":  # on a CPU ignored rows were dropped before the product
            tile.masked_fill_(ignored[:, None], 0)
        if tile.dtype != logits.dtype:
            logits[rows] = tile
