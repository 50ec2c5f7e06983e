"""Prompt ensembles: several prompts of one frozen model, trained in one batch stream and asked together.

Section 6 of Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning": N prompts stand
in for N models, and the frozen model is there once. Here every step packs its batch once per prompt and runs
one forward and one backward for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

COMBINATIONS = ("vote", "mean")


def combine(probabilities: Tensor, how: str = "vote") -> tuple[Tensor, Tensor]:
    """One prediction of each row from those of several prompts.

    Args:
        probabilities: [K, N, C] of C labels behind each of K prompts, above 0 or equal to it.
        how: "vote": the label that most prompts prefer; where several labels have as many votes, the one of
            them with the greatest mean log-probability. "mean": the greatest mean log-probability.

    Returns:
        [N] numbers of the chosen labels, and [N, C] the probabilities `∝ exp(mean over prompts of log p)`.

    Raises:
        ValueError: an unknown `how`, or another rank.
    """
    if how not in COMBINATIONS:
        raise ValueError(f"how must be one of {', '.join(map(repr, COMBINATIONS))}, got {how!r}")
    if probabilities.ndim != 3:
        raise ValueError(f"probabilities must be [K, N, C], got {list(probabilities.shape)}")
    mean = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log().mean(0)
    shares = mean.softmax(1)
    if how == "mean":
        return mean.argmax(1), shares
    choices = probabilities.argmax(2)
    votes = torch.nn.functional.one_hot(choices, probabilities.shape[2]).sum(0)
    tied = votes == votes.amax(1, keepdim=True)
    return mean.masked_fill(~tied, -torch.inf).argmax(1), shares
