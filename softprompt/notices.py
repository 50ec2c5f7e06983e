"""What a patched model says once: calls that PEFT serves, and dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from softprompt.engine import families
from softprompt.engine.runner import UnsupportedModelError
from softprompt.state import PatchState
from softprompt.warn import warn


def fall_back(model: Any, reason: str, adapter_names: Sequence[str] | None, method: str = "forward") -> None:
    state: PatchState = model._softprompt
    if state.options.on_unsupported == "error":
        raise UnsupportedModelError(f"softprompt: {reason}")
    if state.options.without_stock is not None:
        raise UnsupportedModelError(
            f"softprompt: {state.options.without_stock} has no stock {method} to fall back to: {reason}"
        )
    if adapter_names is not None:
        raise UnsupportedModelError(
            f"softprompt: adapter_names has no stock {method} to fall back to: {reason}"
        )
    state.fallbacks[reason] = state.fallbacks.get(reason, 0) + 1
    # `patch` has said why forward is PEFT's.
    note = reason if method == "forward" else f"{method}: {reason}"
    say_once(model, note, f"PEFT's own {method} was used: {reason}")


def say_once(model: Any, note: str, message: str | None = None) -> None:
    """One warning of a patched model for a note, with a message that is longer than the note."""
    state: PatchState = model._softprompt
    if note not in state.said:
        state.said.add(note)
        warn(message or note)


_PACKED = "the packed row draws the prompt's masks once per step where PEFT draws them per row"


def say_dropout(model: Any, base: nn.Module, why: str = _PACKED) -> None:
    """One warning where a patched model in training mode has dropout."""
    if "dropout" in model._softprompt.said:
        return
    model._softprompt.said.add("dropout")  # also where there is none: it is looked for once
    active = families.dropout_of(base)
    if active:
        warn(
            f"the frozen model has dropout ({', '.join(active)}) and is in training mode: {why} "
            "(same expectation, other numbers); model.eval() or p = 0 gives PEFT's numbers"
        )
