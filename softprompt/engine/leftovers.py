"""What a call of `generate` leaves on a model for its own steps, and what other calls must not compute with.

The models that read pictures count places in three dimensions, and keep how far they are from the number of
tokens (`rope_deltas`, a row for each text). A forward on embeddings, as PEFT's, takes those of the last
`generate`: it fails on a batch of another size, and counts pads otherwise than before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from softprompt.engine.structure import structure_of

LEFT = "rope_deltas"


@contextlib.contextmanager
def without_leftovers(model: nn.Module) -> Iterator[None]:
    """The model is in the block as if it had not generated, and as before behind it."""
    holders = [module for module in structure_of(model)[1] if module.__dict__.get(LEFT) is not None]
    before = [module.__dict__[LEFT] for module in holders]
    for module in holders:
        module.__dict__[LEFT] = None
    try:
        yield
    finally:
        for module in structure_of(model)[1]:
            if LEFT in module.__dict__:
                module.__dict__[LEFT] = None
        for module, value in zip(holders, before, strict=True):
            module.__dict__[LEFT] = value
