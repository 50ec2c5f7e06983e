"""The Triton kernels of `linear_cross_entropy`; triton.py launches them."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)


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
        maximum, total, plain_sum = _online_sums(
            row_ptr,
            bias_ptr,
            0,
            vocab_size,
            vocab_size,
            row_length,
            SOFTCAP,
            LOGIT_SCALE,
            LABEL_SMOOTHING,
            BLOCK,
            GROUP,
            ACC,
        )
        # Read before the reductions: their barrier keeps it before any thread's write of the gradient.
        known = (target >= 0) & (target < vocab_size)
        target = tl.where(known, target, 0)
        picked = _load_logits(row_ptr, bias_ptr, target, known, row_length, SOFTCAP, LOGIT_SCALE, ACC)
        largest = tl.max(maximum, 0)
        lse = largest + tl.log(tl.sum(total * tl.exp(maximum - largest), 0))
        loss = _loss(lse, picked, tl.sum(plain_sum, 0), vocab_size, LABEL_SMOOTHING, ACC)
        tl.store(losses_ptr + row, tl.where(known, loss, float("nan")))
        if GRADIENT:
            _write_gradient(
                row_ptr,
                bias_ptr,
                grad_losses_ptr,
                row,
                0,
                row_length,
                target,
                lse,
                vocab_size,
                row_length,
                SOFTCAP,
                LOGIT_SCALE,
                LABEL_SMOOTHING,
                BLOCK,
                GROUP,
                ACC,
            )


@triton.jit
def _online_sums(
    row_ptr,
    bias_ptr,
    first,
    end,  # of the columns, at most V
    vocab_size,
    row_length,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
):
    """Maximum, sum of exponentials above it, and plain sum of some columns of a row, for each group.

    Each group of columns keeps its own. The loop has no reduction across threads, and one exponential per
    group, not per column, for the change of the maximum.
    """
    GROUPS: tl.constexpr = BLOCK // GROUP
    block = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    maximum = tl.full((GROUPS,), LOWEST, ACC)
    total = tl.zeros((GROUPS,), ACC)
    plain_sum = tl.zeros((GROUPS,), ACC)
    for start in range(first, end, BLOCK):
        inside = start + block < vocab_size
        logits = _load_logits(row_ptr, bias_ptr, start + block, inside, row_length, SOFTCAP, LOGIT_SCALE, ACC)
        larger = tl.maximum(maximum, tl.max(logits, 1))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(logits - larger[:, None]), 1)
        maximum = larger
        if LABEL_SMOOTHING > 0:
            plain_sum += tl.sum(tl.where(inside, logits, 0.0), 1)
    return maximum, total, plain_sum


@triton.jit
def _loss(lse, picked, plain_sum, vocab_size, LABEL_SMOOTHING: tl.constexpr, ACC: tl.constexpr):
    """The loss of a row; smoothing mixes the target's with the mean over the vocabulary."""
    loss = lse - picked
    if LABEL_SMOOTHING > 0:
        # Not the plain constants: those would be fp32 in fp64 arithmetic.
        share = tl.full((), 1 - LABEL_SMOOTHING, ACC)
        uniform = tl.full((), LABEL_SMOOTHING, ACC) / vocab_size
        loss = share * loss + (LABEL_SMOOTHING * lse - uniform * plain_sum)
    return loss


@triton.jit
def _write_gradient(
    row_ptr,
    bias_ptr,
    grad_losses_ptr,
    row,
    first,
    end,  # of the columns, at most the row length
    target,
    lse,
    vocab_size,
    row_length,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
):
    """Overwrites some columns of a row of logits with their gradient; zeros beyond V."""
    GROUPS: tl.constexpr = BLOCK // GROUP
    block = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    # Not the plain constants: those would be fp32 in fp64 arithmetic.
    share = tl.full((), 1 - LABEL_SMOOTHING, ACC)
    uniform = tl.full((), LABEL_SMOOTHING, ACC) / vocab_size
    factor = tl.full((), LOGIT_SCALE, ACC)
    if grad_losses_ptr is not None:
        factor *= tl.load(grad_losses_ptr + row)
    for start in range(first, end, BLOCK):
        columns = start + block
        inside = columns < vocab_size
        logits = _load_logits(row_ptr, bias_ptr, columns, inside, row_length, SOFTCAP, LOGIT_SCALE, ACC)
        gradient = tl.exp(logits - lse) - tl.where(columns == target, share, 0.0)
        if LABEL_SMOOTHING > 0:
            gradient -= uniform
        if SOFTCAP is not None:
            capped = logits / SOFTCAP
            gradient *= 1 - capped * capped
        gradient = tl.where(inside, gradient * factor, 0.0)
        tl.store(row_ptr + columns, gradient.to(row_ptr.dtype.element_ty), mask=columns < row_length)


# Grid: (rows, shares). A program owns one share of one row and writes its maximum, its sum of exponentials
# and its plain sum to partials[row, :, share].
# Moves: the row is read once. An ignored row is not read.
@triton.jit(do_not_specialize=["ignore_index"])
def _partial_sums(
    logits_ptr,  # [m, row_length]
    bias_ptr,  # [V] or None
    targets_ptr,  # [m]
    partials_ptr,  # [m, 3, SPLITS]
    vocab_size,
    row_length,
    share_length,  # columns of a share, a multiple of BLOCK
    ignore_index,
    SOFTCAP: tl.constexpr,  # None: none
    LOGIT_SCALE: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(targets_ptr + row) != ignore_index:
        first = split * share_length
        maximum, total, plain_sum = _online_sums(
            logits_ptr + row * row_length,
            bias_ptr,
            first,
            tl.minimum(first + share_length, vocab_size),
            vocab_size,
            row_length,
            SOFTCAP,
            LOGIT_SCALE,
            LABEL_SMOOTHING,
            BLOCK,
            GROUP,
            ACC,
        )
        largest = tl.max(maximum, 0)
        out = partials_ptr + row * 3 * SPLITS + split
        tl.store(out, largest)
        tl.store(out + SPLITS, tl.sum(total * tl.exp(maximum - largest), 0))
        tl.store(out + 2 * SPLITS, tl.sum(plain_sum, 0))


# Grid: (rows, shares). A program owns one share of one row and writes its gradient; the one whose share holds
# the target also writes the loss, because another may have overwritten the target's logit otherwise.
# Moves: the row is read once (mostly from L2) and written once. An ignored row is only written.
@triton.jit(do_not_specialize=["ignore_index"])
def _loss_and_gradient_of_shares(
    logits_ptr,  # [m, row_length], overwritten with the gradient
    bias_ptr,  # [V] or None
    targets_ptr,  # [m]
    losses_ptr,  # [m]
    grad_losses_ptr,  # [m] or None
    partials_ptr,  # [m, 3, SPLITS]
    vocab_size,
    row_length,
    share_length,  # columns of a share, a multiple of BLOCK
    ignore_index,
    SOFTCAP: tl.constexpr,  # None: none
    LOGIT_SCALE: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    GRADIENT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    ACC: tl.constexpr = losses_ptr.dtype.element_ty
    GROUPS: tl.constexpr = BLOCK // GROUP
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row_ptr = logits_ptr + row * row_length
    first = split * share_length
    end = tl.minimum(first + share_length, row_length)
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        if split == 0:
            tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            block = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            zeros = tl.zeros((GROUPS, GROUP), logits_ptr.dtype.element_ty)
            for start in range(first, end, BLOCK):
                tl.store(row_ptr + start + block, zeros, mask=start + block < row_length)
    else:
        known = (target >= 0) & (target < vocab_size)
        target = tl.where(known, target, 0)
        holds_target = (target >= first) & (target < first + share_length)
        picked = _load_logits(row_ptr, bias_ptr, target, holds_target, row_length, SOFTCAP, LOGIT_SCALE, ACC)
        shares = partials_ptr + row * 3 * SPLITS + tl.arange(0, SPLITS)
        maxima = tl.load(shares)
        largest = tl.max(maxima, 0)
        lse = largest + tl.log(tl.sum(tl.load(shares + SPLITS) * tl.exp(maxima - largest), 0))
        if holds_target:
            plain_sum = tl.sum(tl.load(shares + 2 * SPLITS), 0)
            loss = _loss(lse, picked, plain_sum, vocab_size, LABEL_SMOOTHING, ACC)
            tl.store(losses_ptr + row, tl.where(known, loss, float("nan")))
        if GRADIENT:
            # Every warp has `picked` before any warp writes over it; the reductions above stay in a warp.
            tl.debug_barrier()
            _write_gradient(
                row_ptr,
                bias_ptr,
                grad_losses_ptr,
                row,
                first,
                end,
                target,
                lse,
                vocab_size,
                row_length,
                SOFTCAP,
                LOGIT_SCALE,
                LABEL_SMOOTHING,
                BLOCK,
                GROUP,
                ACC,
            )


# Grid: one program. Moves: losses, and targets where they are counted, are read once.
@triton.jit(do_not_specialize=["num_rows", "divisor", "ignore_index"])
def _reduce_losses(
    losses_ptr,  # [M]
    targets_ptr,  # [M]
    num_items_ptr,  # one element or None
    total_ptr,  # [] sum / denominator
    factor_ptr,  # [] 1 / denominator
    num_rows,
    losses_stride,
    targets_stride,
    divisor,
    ignore_index,
    COUNT: tl.constexpr,  # divide by the number of targets that are not ignored
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = total_ptr.dtype.element_ty
    total = tl.zeros((BLOCK,), ACC)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < num_rows
        total += tl.load(losses_ptr + row * losses_stride, mask=inside, other=0.0)
        if COUNT:
            target = tl.load(targets_ptr + row * targets_stride, mask=inside, other=ignore_index)
            count += (inside & (target != ignore_index)).to(tl.int32)
    if num_items_ptr is not None:
        denominator = tl.load(num_items_ptr).to(ACC)
        denominator = tl.where(denominator == 0, 1.0, denominator)
    elif COUNT:
        denominator = tl.maximum(tl.sum(count, 0), 1).to(ACC)
    else:
        denominator = tl.full((), 0, ACC) + divisor
    tl.store(total_ptr, tl.sum(total, 0) / denominator)
    tl.store(factor_ptr, 1.0 / denominator)
