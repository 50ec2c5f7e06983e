"""A rehearsal: everything that a GPU pass does, at toy sizes on the CPU."""

from __future__ import annotations

import os
from typing import Any

import torch

_STATE = {"rehearsing": False}


def rehearse() -> None:
    """From now on steps are "recorded" by running them again, and torch.compile generates no code.

    Nothing that is timed then means anything.
    """
    from softprompt.engine.cuda_graph import RECORDERS, RerunRecorder

    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    RECORDERS["cpu"] = RerunRecorder()
    _STATE["rehearsing"] = True


def stop_rehearsing() -> None:
    """Takes `rehearse` back."""
    from softprompt.engine.cuda_graph import RECORDERS

    RECORDERS.pop("cpu", None)
    _STATE["rehearsing"] = False


def rehearsing() -> bool:
    """Whether this is a rehearsal."""
    return _STATE["rehearsing"]


def compile_options(mode: str | None = None) -> dict[str, Any]:
    """Arguments of `torch.compile` for a mode."""
    if _STATE["rehearsing"]:
        return {"backend": "aot_eager"}
    return {} if mode is None else {"mode": mode}


def has_gpu() -> bool:
    """Whether the GPU suites can run for real."""
    return torch.cuda.is_available()
