"""The two matrix products of a chunk of label rows with the head's weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softprompt.ops.linear_cross_entropy import native

_FORWARD_BLOCKS, _BACKWARD_BLOCKS, _SMALLEST_BLOCK = 128, 4, 1024


def logits_of(rows: Tensor, weight: Tensor, out: Tensor, backend: str) -> None:
    """`out = rows @ weight.T`: [m, H] and [V, H] to [m, V], by the back end of the call."""
    if backend == "native" and native.serves_few_rows(rows, weight):
        native.logits_of_few_rows(rows, weight, out)
        return
    blocks = _vocabulary_blocks(weight, _FORWARD_BLOCKS)
    if blocks == 1:
        torch.mm(rows, weight.t(), out=out)
        return
    torch.bmm(
        rows.expand(blocks, -1, -1),
        weight.unflatten(0, (blocks, -1)).transpose(1, 2),
        out=out.unflatten(1, (blocks, -1)).transpose(0, 1),
    )


def d_rows_of(d_logits: Tensor, weight: Tensor, out: Tensor, backend: str) -> None:
    """`out = d_logits @ weight`: [m, V] and [V, H] to [m, H], by the back end of the call."""
    if backend == "native" and native.serves_few_rows(d_logits, weight):
        native.d_rows_of_few_rows(d_logits, weight, out)
        return
    blocks = _vocabulary_blocks(weight, _BACKWARD_BLOCKS)
    if blocks == 1:
        torch.mm(d_logits, weight, out=out)
        return
    shares = torch.bmm(d_logits.unflatten(1, (blocks, -1)).transpose(0, 1), weight.unflatten(0, (blocks, -1)))
    torch.sum(shares, 0, out=out)


def _vocabulary_blocks(weight: Tensor, most: int) -> int:
    """Into how many equal blocks of the vocabulary a product is split; 1 where that is not known to pay.

    On a CPU a product of few rows with a large fp32 weight is split badly between threads by BLAS. As a
    batch of products it took 0.7 of the time with 8 to 32 rows, two threads and a vocabulary of 250,880.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return 1
    blocks = math.gcd(weight.shape[0], most)
    return blocks if weight.shape[0] // blocks >= _SMALLEST_BLOCK else 1
