"""Attributes of modules that are others for the length of a block."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn

# A packed call sets attributes of the model and of its configuration, which replicas in other threads may
# share: one call at a time.
IN_USE = threading.RLock()
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextlib.contextmanager
def override(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Attributes of an instance, put back as they were."""
    before = {name: module.__dict__[name] for name in attributes if name in module.__dict__}
    module.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)


@contextlib.contextmanager
def returning(module: nn.Module, output: Any) -> Iterator[None]:
    """A part of a model returns `output` in the block, without running and without its hooks. One thread at a
    time is inside.

    Raises:
        RuntimeError: at the end, where nothing has called it.
    """
    called = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        called = True
        return output

    # The output comes from behind the module's hooks: they must not act a second time.
    with IN_USE, override(module, forward=forward, **{name: OrderedDict() for name in HOOKS}):
        yield
    if not called:
        raise RuntimeError(f"the model never calls the {type(module).__name__} that it holds")
