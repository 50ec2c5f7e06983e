"""The row function of `linear_cross_entropy` as one Triton kernel."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-3.0e38)
FEW_ROWS = 128


def launch_shape(num_rows: int, row_length: int) -> tuple[int, int]:
    """Columns that a program holds at a time, and its warps: 16 columns a thread.

    A row belongs to one multiprocessor. Where there are fewer rows than multiprocessors it gets all the warps
    of its own; otherwise two programs of half the size share one, so that one loads while the other reduces.
    """
    widest = 16384 if num_rows <= FEW_ROWS else 8192
    block = min(widest, max(512, triton.next_power_of_2(row_length)))
    return block, block // 512


def rows_loss_and_gradient_(
    logits: Tensor,  # [m, V], rows of a buffer whose row length is a multiple of 16
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
    """Writes the losses of `logits`, and `d(loss)/d(logits)` over `logits`: one launch.

    The padding between V and the row length belongs to the kernel, which may overwrite it.
    """
    num_rows, vocab_size = logits.shape
    row_length = logits.stride(0)
    block, num_warps = launch_shape(num_rows, row_length)
    with torch.cuda.device_of(logits):
        _rows_loss_and_gradient[(num_rows,)](
            logits,
            None if bias is None else bias.contiguous(),
            targets.contiguous(),
            losses,
            grad_losses,
            vocab_size,
            row_length,
            ignore_index,
            SOFTCAP=softcap,
            LOGIT_SCALE=logit_scale,
            LABEL_SMOOTHING=label_smoothing,
            GRADIENT=gradient,
            BLOCK=block,
            GROUP=16 // logits.element_size(),
            num_warps=num_warps,
        )


@triton.jit
def _load_logits(
    row_ptr,
    bias_ptr,
    columns,
    inside,  # columns < V
    row_length,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Bias, scale and softcap of a block of one row; -inf beyond V."""
    # The row's padding is loaded too: `row_length` is a multiple of 16 where V may be odd, and a mask that
    # can change at any column would make every load a scalar one.
    logits = tl.load(row_ptr + columns, mask=columns < row_length, other=0.0).to(ACC)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(ACC)
    if LOGIT_SCALE != 1:
        logits *= LOGIT_SCALE
    if SOFTCAP is not None:
        logits = SOFTCAP * (2 * tl.sigmoid(logits * (2 / SOFTCAP)) - 1)
    return tl.where(inside, logits, float("-inf"))


# Grid: one program a row. It owns the row of logits, its loss and, in place, its gradient.
# Moves: the row is read twice (the second time mostly from L2) and written once. An ignored row is only
# written.
@triton.jit(do_not_specialize=["ignore_index"])
def _rows_loss_and_gradient(
    logits_ptr,  # [m, row_length], overwritten with the gradient
    bias_ptr,  # [V] or None
    targets_ptr,  # [m]
    losses_ptr,  # [m]
    grad_losses_ptr,  # [m] or None
    vocab_size,
    row_length,
    ignore_index,
    SOFTCAP: tl.constexpr,  # None: none
    LOGIT_SCALE: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,  # neighbouring columns that one thread loads at once
):
    ACC: tl.constexpr = losses_ptr.dtype.element_ty
    GROUPS: tl.constexpr = BLOCK // GROUP
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_length
    block = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, row_length, BLOCK):
                zeros = tl.zeros((GROUPS, GROUP), logits_ptr.dtype.element_ty)
                tl.store(row_ptr + start + block, zeros, mask=start + block < row_length)
    else:
        # Each group of columns keeps its own maximum and sum. The loop has no reduction across threads, and
        # one exponential per group, not per column, for the change of the maximum.
        maximum = tl.full((GROUPS,), LOWEST, ACC)
        total = tl.zeros((GROUPS,), ACC)
        plain_sum = tl.zeros((GROUPS,), ACC)
        for start in range(0, vocab_size, BLOCK):
            inside = start + block < vocab_size
            logits = _load_logits(
                row_ptr, bias_ptr, start + block, inside, row_length, SOFTCAP, LOGIT_SCALE, ACC
            )
            larger = tl.maximum(maximum, tl.max(logits, 1))
            total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(logits - larger[:, None]), 1)
            maximum = larger
            if LABEL_SMOOTHING > 0:
                plain_sum += tl.sum(tl.where(inside, logits, 0.0), 1)
        # Read before the reductions: their barrier keeps it before any thread's write of the gradient.
        known = (target >= 0) & (target < vocab_size)
        target = tl.where(known, target, 0)
        picked = _load_logits(row_ptr, bias_ptr, target, known, row_length, SOFTCAP, LOGIT_SCALE, ACC)
        largest = tl.max(maximum, 0)
        lse = largest + tl.log(tl.sum(total * tl.exp(maximum - largest), 0))
        loss = lse - picked
        # Not the plain constants: those would be fp32 in fp64 arithmetic.
        share = tl.full((), 1 - LABEL_SMOOTHING, ACC)
        uniform = tl.full((), LABEL_SMOOTHING, ACC) / vocab_size
        if LABEL_SMOOTHING > 0:
            loss = share * loss + (LABEL_SMOOTHING * lse - uniform * tl.sum(plain_sum, 0))
        tl.store(losses_ptr + row, tl.where(known, loss, float("nan")))

        if GRADIENT:
            factor = tl.full((), LOGIT_SCALE, ACC)
            if grad_losses_ptr is not None:
                factor *= tl.load(grad_losses_ptr + row)
            for start in range(0, row_length, BLOCK):
                columns = start + block
                inside = columns < vocab_size
                logits = _load_logits(
                    row_ptr, bias_ptr, columns, inside, row_length, SOFTCAP, LOGIT_SCALE, ACC
                )
                gradient = tl.exp(logits - lse) - tl.where(columns == target, share, 0.0)
                if LABEL_SMOOTHING > 0:
                    gradient -= uniform
                if SOFTCAP is not None:
                    capped = logits / SOFTCAP
                    gradient *= 1 - capped * capped
                gradient = tl.where(inside, gradient * factor, 0.0)
                tl.store(
                    row_ptr + columns,
                    gradient.to(logits_ptr.dtype.element_ty),
                    mask=columns < row_length,
                )
