"""Whether what stands in pads changes the tokens that count, tried on the model's own forward.

Layers that round all tokens of a batch with one scale do that. Those that are known are known by name
(`precision.whole_batch_obstacle`); others show it where a pad holds the largest number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from softprompt.engine import precision

_LOUD = 64.0  # times the largest number of the other tokens
_EXACT = 1e-5  # largest relative difference of models that compute in fp32 or fp64


def tried(difference_of_pads: Callable[[], str | None]) -> str | None:
    """What a trial says; a model that cannot be asked keeps its pads."""
    try:
        return difference_of_pads()
    except Exception as error:
        return f"whether pads change the other tokens cannot be tried: {type(error).__name__}: {error}"


@torch.no_grad()
def difference(
    model: nn.Module, embeds: Tensor, pads: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> str | None:
    """Why pads may not be dropped, as a sentence, or None.

    Args:
        model: the language model.
        embeds: [B, L, H] of a batch.
        pads: [B, L] bool: what the model should not look at.
        logits_of: what the model's own forward makes of such a batch at the tokens that count.
    """
    loud = embeds.clone()
    # A single number of a vector stands out behind a normalisation as well.
    loud[..., 0] = torch.where(pads, _LOUD * embeds.abs().amax(), embeds[..., 0])
    before, after = logits_of(embeds).double(), logits_of(loud).double()
    off = float((after - before).norm() / before.norm().clamp_min(1e-12))
    bound = max(_EXACT, 4 * torch.finfo(precision.coarsest_dtype(model)).eps)
    if off <= bound:
        return None
    return f"numbers that stand out in pads change the other tokens (logits by {off:.1e}, tried on two rows)"
