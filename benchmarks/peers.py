"""What others offer, put on top of PEFT's own forward; nothing is replaced for good."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from benchmarks.rehearsal import compile_options

IGNORE_INDEX = -100
CHUNK_ROWS = 256  # of TRL's chunked loss

HeadLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # [N, H] hidden, [V, H] weight, [N] targets -> loss


def missing(module: str, package: str) -> Callable[[], str | None]:
    """Says that a package is not installed."""

    def obstacle() -> str | None:
        return None if importlib.util.find_spec(module) else f"{package} is not installed"

    return obstacle


def compiled(mode: str | None = None) -> Callable[[Any], Any]:
    """`torch.compile` in a mode."""
    return lambda model: torch.compile(model, **compile_options(mode))


def headed(head_loss: HeadLoss) -> Callable[[Any, dict[str, Tensor]], Tensor]:
    """PEFT's forward up to the hidden rows, and another head.

    While PEFT's forward runs, the base model's head is the identity, so that its "logits" are the hidden
    rows: the prompt, the mask and the decoder are exactly PEFT's.
    """

    def loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        base = model.get_base_model()
        head = base.get_output_embeddings()
        base.set_output_embeddings(nn.Identity())
        try:
            hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        finally:
            base.set_output_embeddings(head)
        labels = inputs["labels"]
        # Row i predicts label i + 1, so the row's last position and the prompt's first labels are ignored.
        padded = functional.pad(labels, (hidden.shape[1] - labels.shape[1], 1), value=IGNORE_INDEX)
        return head_loss(hidden.flatten(0, 1), head.weight, padded[:, 1:].reshape(-1))

    return loss


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Label rows only, a chunk at a time, and computed again in the backward, as TRL's chunked loss does."""
    rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    hidden, targets = hidden[rows], targets[rows]
    total = sum(
        checkpoint(_chunk_loss, part, weight, target, use_reentrant=False)
        for part, target in zip(hidden.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True)
    )
    return total / rows.numel()


def _chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="sum")


def liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger-Kernel's fused linear cross-entropy, on all rows as its own model forwards call it."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets)
    return loss


def cce_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cut cross-entropy, which leaves ignored rows out by itself.

    Without its filter, which leaves out blocks of small probabilities: behind random weights nearly all are
    small, and the gradient would be off by up to 3 %.
    """
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(hidden, weight, targets, filter_eps=None)
    return loss
