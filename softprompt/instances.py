"""How a patch holds on to an instance: its class becomes a subclass, which copies and files do not name."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from softprompt.calls import without_wrapped
from softprompt.state import STATE, PatchState, give_state

Method = TypeVar("Method", bound=Callable[..., Any])


@functools.cache
def subclass_of(front: type, stock: type) -> type:
    """The subclass of a PEFT class with `front` before it, under the name of the PEFT class."""
    return type(
        stock.__name__,
        (front, stock),
        {"__module__": stock.__module__, "__qualname__": stock.__qualname__},
    )


def is_own_method(model: nn.Module, name: str, value: Any) -> bool:
    """Whether a value of an instance is its class's own method, bound (PEFT's contexts leave such copies)."""
    return (
        inspect.ismethod(value)
        and value.__self__ is model
        and value.__func__ is getattr(type(model), name, None)
    )


def outlives_the_patch(method: Method) -> Method:
    """A method of a patched class that may be kept, bound, while the patch comes and goes.

    accelerate's `prepare` and `add_hook_to_module` wrap the forward of an instance, and others keep
    `model.forward` in an attribute. Called after `unpatch`, it is the method that the class has then.
    """

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, PatchedInstance):
            return method(self, *args, **kwargs)
        return getattr(type(self), method.__name__)(self, *args, **kwargs)

    return without_wrapped(called, method)


class PatchedInstance:
    """What the classes in front of PEFT's have in common."""

    _softprompt: PatchState

    def __setstate__(self, values: dict[str, Any]) -> None:
        """A copy, or what a file holds."""
        super().__setstate__(values)  # type: ignore[misc]
        known: Any = self
        give_state(known, self._softprompt)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's, which would leave half a folder where a configuration holds a path and no string."""
        known: Any = self
        for config in known.peft_config.values():
            for name, value in vars(config).items():
                if isinstance(value, os.PathLike):
                    setattr(config, name, os.fspath(value))  # JSON has no paths
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and files name the stock class, and leave out what only counts for this instance."""
        known: Any = self
        kept = {
            name: value
            for name, value in known.__getstate__().items()
            if not is_own_method(known, name, value)
        }
        state = kept | {STATE: PatchState(self._softprompt.options, self._softprompt.stock_class)}
        front = type(self).__bases__[0]
        return _rebuild, (front, self._softprompt.stock_class), state


def _rebuild(front: type, stock: type) -> Any:
    cls: Any = subclass_of(front, stock)
    return cls.__new__(cls)
