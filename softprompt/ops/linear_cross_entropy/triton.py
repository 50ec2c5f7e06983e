"""The row function of `linear_cross_entropy` and the reduction of its losses in Triton: the launches."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from softprompt.ops.linear_cross_entropy.arguments import LossOptions
from softprompt.ops.linear_cross_entropy.triton_kernels import (
    _loss_and_gradient_of_shares,
    _partial_sums,
    _reduce_losses,
    _rows_loss_and_gradient,
)

# About two programs for each multiprocessor of a large GPU: fewer rows than that are split.
PROGRAMS = 256
SPLIT_BLOCK = 4096
COLUMNS_PER_WARP = 512  # 16 for each thread


def launch_shape(row_length: int) -> tuple[int, int]:
    """Columns that a program of a whole row holds at a time, and its warps."""
    block = min(8192, max(512, triton.next_power_of_2(row_length)))
    return block, block // COLUMNS_PER_WARP


def splits_of(num_rows: int, row_length: int) -> int:
    """Into how many shares a row is split: a power of two; 1 where the rows alone fill the GPU."""
    if num_rows == 0:
        return 1
    wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS, num_rows))
    count: int = max(1, min(wanted, triton.next_power_of_2(triton.cdiv(row_length, SPLIT_BLOCK))))
    return count


def rows_loss_and_gradient_(
    logits: Tensor,  # [m, V], rows of a buffer whose row length is a multiple of 16
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [m]
    losses: Tensor,  # [m]
    grad_losses: Tensor | None,  # [m]
    options: LossOptions,
    *,
    gradient: bool,
) -> None:
    """Writes the losses of `logits`, and `d(loss)/d(logits)` over `logits`: one launch, or two for few rows.

    A row of 250,880 bf16 logits is 0.5 MB, which one multiprocessor takes some 25 us to read twice and write
    (estimate: 32 KiB in flight at 0.7 us latency); beside a product whose floor is 120 us that is too much.
    Few rows are therefore split: a first launch leaves the maximum and the sum of every share, a second one
    combines a row's shares, always in the same order, and writes the gradient.

    The padding between V and the row length is read with the row, and is zero after it where it was before.
    """
    num_rows, vocab_size = logits.shape
    row_length = logits.stride(0)
    bias = None if bias is None else bias.contiguous()
    targets = targets.contiguous()
    splits = splits_of(num_rows, row_length)
    block, num_warps = (
        launch_shape(row_length)
        if splits == 1
        else (
            SPLIT_BLOCK,
            max(1, SPLIT_BLOCK // COLUMNS_PER_WARP),
        )
    )
    common: dict[str, Any] = {
        "SOFTCAP": options.softcap,
        "LOGIT_SCALE": options.logit_scale,
        "LABEL_SMOOTHING": options.label_smoothing,
        "BLOCK": block,
        "GROUP": 16 // logits.element_size(),
        "num_warps": num_warps,
    }
    sizes = [vocab_size, row_length]
    ignored = options.ignore_index
    with torch.cuda.device_of(logits):
        if splits == 1:
            _rows_loss_and_gradient[(num_rows,)](
                logits, bias, targets, losses, grad_losses, *sizes, ignored, GRADIENT=gradient, **common
            )
            return
        sizes.append(triton.cdiv(row_length, block * splits) * block)
        common["SPLITS"] = splits
        partials = torch.empty(num_rows, 3, splits, dtype=losses.dtype, device=logits.device)
        grid = (num_rows, splits)
        _partial_sums[grid](logits, bias, targets, partials, *sizes, ignored, **common)
        _loss_and_gradient_of_shares[grid](
            logits, bias, targets, losses, grad_losses, partials, *sizes, ignored, GRADIENT=gradient, **common
        )


def reduce_losses(
    losses: Tensor,  # [M]
    targets: Tensor,  # [M]
    num_items: Tensor | None,  # one element
    divisor: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The sum over the denominator, and 1 / denominator: one launch."""
    total, factor = losses.new_empty(()), losses.new_empty(())
    with torch.cuda.device_of(losses):
        _reduce_losses[(1,)](
            losses,
            targets,
            num_items,
            total,
            factor,
            losses.shape[0],
            losses.stride(0),
            targets.stride(0),
            divisor,
            ignore_index,
            COUNT=divisor == 0,
            BLOCK=1024,
            num_warps=4,
        )
    return total, factor
