"""The only place that keeps things by model: what is known of a module goes when the module goes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn

T = TypeVar("T")

# module -> name of a fact -> (key, value); nothing in here may hold the module, or it would live forever.
_RECORDS: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Any]]] = weakref.WeakKeyDictionary()


def kept(module: nn.Module, name: str, key: Any, make: Callable[[], T]) -> T:
    """The fact `name` of a module: made on first use, and again when `key` is another than before."""
    record = _RECORDS.setdefault(module, {})
    known = record.get(name)
    if known is None or known[0] != key:
        known = record[name] = (key, make())
    value: T = known[1]
    return value


def last(module: nn.Module, name: str) -> tuple[Any, Any] | None:
    """The key and the value of a fact as it was made last, None where it never was."""
    return _RECORDS.get(module, {}).get(name)


def lock_of(module: nn.Module) -> threading.RLock:
    """The lock of a module, reentrant."""
    # Two threads that come at once have to get the same.
    record = _RECORDS.setdefault(module, {})
    return cast(threading.RLock, record.setdefault("lock", (None, threading.RLock()))[1])


def put(module: nn.Module, name: str, key: Any, value: T) -> T:
    """Keeps `value` as the fact `name` of a module."""
    _RECORDS.setdefault(module, {})[name] = (key, value)
    return value
