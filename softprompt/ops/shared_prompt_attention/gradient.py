"""What the gradients of the attention's opaque ops have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    """The `backward` of an op that computes gradients.

    Without it, autograd would take the gradients for constants: a wrong second derivative and a warning.
    """
    raise RuntimeError("shared_prompt_attention can be differentiated once, got a second derivative")
