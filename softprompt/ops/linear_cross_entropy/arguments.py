"""What the parts of `linear_cross_entropy` hand on: a head with its rows, and what becomes of its logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from softprompt.ops.constants import IGNORE_INDEX


class Head(NamedTuple):
    """A linear head, the hidden states before it, and the rows and targets that are scored."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    label_rows: Tensor | None  # [M]
    targets: Tensor  # [M]


class LossOptions(NamedTuple):
    """See `linear_cross_entropy`."""

    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int = IGNORE_INDEX
