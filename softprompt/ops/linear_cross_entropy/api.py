"""`linear_cross_entropy`: the loss of the label rows, without the logits of the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt.ops.checks import check_same_device
from softprompt.ops.constants import IGNORE_INDEX
from softprompt.ops.linear_cross_entropy.arguments import Head, LossOptions
from softprompt.ops.linear_cross_entropy.chunked import losses_of_rows
from softprompt.ops.linear_cross_entropy.reduction import reduce_losses
from softprompt.ops.registry import AUTO

REDUCTIONS = ("mean", "sum", "none")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INDEX_DTYPES = (torch.int32, torch.int64)


def linear_cross_entropy(
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
    backend: str = AUTO,
) -> Tensor:
    """`cross_entropy(logits, targets)` with `logits = softcap * tanh(logit_scale * (h Wᵀ + bias) / softcap)`.

    `h = hidden[label_rows]` is gathered first, so only M rows meet the vocabulary, and they do so in chunks:
    there is never a [T, V] tensor, nor an [M, V] one for large M. The gradient of `hidden` is made in the
    forward (two matrix products, nothing is computed twice) and only scaled in the backward; rows that occur
    more than once are summed in fp32. `weight` and `bias` are meant to be frozen; where they require a
    gradient it is computed in the backward from a second pass over the chunks.

    Args:
        hidden: [T, H] fp16, bf16, fp32 or fp64.
        weight: [V, H] in the same dtype; under `torch.autocast` both are used in the autocast dtype (fp64 is
            left alone), as by `functional.linear`.
        label_rows: [M] int32 or int64 rows of `hidden`, in any order, repeated or not. None: the rows whose
            target is not ignored; on a GPU, finding them makes the host wait.
        targets: [M] int32 or int64, 0 .. V-1 or `ignore_index`. On a GPU a target outside of that gives the
            loss NaN, since raising would make the host wait.
        bias: [V], added before the scale and the softcap.
        softcap: soft limit of the logits, applied last (gemma-2). None: no limit.
        logit_scale: factor of the logits (cohere; granite's is 1 / `logits_scaling`). None: 1.
        label_smoothing: share of the target probability that is spread evenly over the vocabulary.
        ignore_index: target without loss and gradient.
        num_items: denominator of the mean instead of the number of targets that are not ignored
            (transformers' `num_items_in_batch`); 0 counts as 1. A tensor has one element.
        reduction: "mean", "sum" or "none" ([M] losses, 0 where ignored).
        backend: "auto", "reference" (plain PyTorch), "triton" or "native": of what a row of logits becomes;
            the matrix products are PyTorch's.

    Returns:
        A scalar, or [M] without reduction, in fp32 (fp64 for fp64 weights). With every target ignored, and
        with M = 0, the loss is 0 with a zero gradient.

    Raises:
        ValueError: ranks, widths, dtypes or options that do not fit.
        IndexError: on a CPU, a target outside 0 .. V-1 or a label row outside 0 .. T-1.

    The gradient made in the forward is that of Liger-Kernel (Hsu et al. 2024, arXiv:2410.10989).
    """
    head = Head(hidden, weight, bias, label_rows, targets)
    options = LossOptions(softcap, 1.0 if logit_scale is None else logit_scale, label_smoothing, ignore_index)
    _check_tensors(head)
    _check_options(options, num_items, reduction)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        head = head._replace(weight=weight.to(torch.get_autocast_dtype(device)))
    elif hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    losses = losses_of_rows(head, options, backend)
    if reduction == "none":
        return losses
    return reduce_losses(
        losses,
        targets,
        num_items=num_items,
        reduction=reduction,
        ignore_index=ignore_index,
        backend=backend,
    )


def _check_tensors(head: Head) -> None:
    hidden, weight, bias, label_rows, targets = head
    if hidden.ndim != 2 or weight.ndim != 2:
        raise ValueError(
            f"hidden and weight must be [T, H] and [V, H], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    num_rows, width = hidden.shape
    vocab_size = weight.shape[0]
    if weight.shape[1] != width:
        raise ValueError(f"weight must be [V, {width}] like hidden's width, got {list(weight.shape)}")
    if vocab_size == 0:
        raise ValueError("weight must have at least one row, got V = 0")
    if label_rows is None:
        if targets.ndim != 1 or targets.shape[0] != num_rows:
            raise ValueError(
                f"targets without label_rows must be [T] = [{num_rows}], got {list(targets.shape)}"
            )
    elif label_rows.ndim != 1 or targets.shape != label_rows.shape:
        raise ValueError(
            f"label_rows and targets must both be [M], got {list(label_rows.shape)} and {list(targets.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (vocab_size,):
        raise ValueError(f"bias must be [V] = [{vocab_size}], got {list(bias.shape)}")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
    for name, tensor in (("label_rows", label_rows), ("targets", targets)):
        if tensor is not None and tensor.dtype not in _INDEX_DTYPES:
            raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")
    check_same_device("linear_cross_entropy", **head._asdict())


def _check_options(options: LossOptions, num_items: int | float | Tensor | None, reduction: str) -> None:
    softcap, logit_scale, label_smoothing, _ = options
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if not logit_scale > 0:
        raise ValueError(f"logit_scale must be positive or None, got {logit_scale}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items replaces the mean's denominator, got it with reduction={reduction!r}")
    check_num_items(num_items)


def check_num_items(num_items: int | float | Tensor | None) -> None:
    """Raises ValueError unless it can be the denominator of a mean; a tensor is not read."""
    if num_items is None:
        return
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must have one element, got shape {list(num_items.shape)}")
    elif not isinstance(num_items, (int, float)) or not num_items >= 0:
        raise ValueError(f"num_items must be a number of at least 0, got {num_items!r}")
