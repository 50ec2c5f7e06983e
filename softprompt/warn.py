"""Warnings that point at the user's program."""

from __future__ import annotations

import os
import sys
import warnings

import peft
import torch

# Between the library and the call that the user wrote stand torch's calls of modules, and PEFT's own.
_INSIDE = tuple(
    os.path.dirname(os.path.abspath(path)) + os.sep for path in (__file__, torch.__file__, peft.__file__)
)


def warn(message: str) -> None:
    """A UserWarning in the name of softprompt, at the nearest line outside of it, of torch and of PEFT."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"softprompt: {message}", stacklevel=level)
