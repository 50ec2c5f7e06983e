"""Attributes and classes of modules that are others for the length of a block."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules import module as nn_module

from softprompt.engine.structure import structure_of

# A packed call sets attributes of the model and of its configuration, which replicas in other threads may
# share: one call at a time.
IN_USE = threading.RLock()
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Fusion:
    """The modules of one body that run as one op in a packed call."""

    # Of each its number in the structure of the body, its class, and its class in a packed call.
    classes: tuple[tuple[int, type, type], ...] = ()
    counts: tuple[tuple[str, str, int], ...] = ()  # a class, its op, and how many modules there are
    left: tuple[str, ...] = ()  # what looks like one of them and is not taken, and why

    @property
    def ops(self) -> tuple[str, ...]:
        """The names of the ops that are called."""
        return tuple(dict.fromkeys(op for _, op, _ in self.counts))

    def modules(self, body: nn.Module) -> list[tuple[nn.Module, type, type]]:
        """Each module, its class, and its class in a packed call."""
        if not self.classes:
            return []
        modules = structure_of(body)[1]
        return [(modules[place], kind, fused) for place, kind, fused in self.classes]


NO_FUSION = Fusion()


def has_global_hooks() -> bool:
    """Whether hooks act on every module of the process."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks act when a module is called."""
    return has_global_hooks() or any(getattr(module, name) for name in HOOKS)


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
