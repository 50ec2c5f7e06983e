"""Prompt tuning for Hugging Face causal LMs without the wasted work."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt import ensemble, multitask
    from softprompt.engine.candidates import score
    from softprompt.engine.forward import forward
    from softprompt.engine.runner import UnsupportedModelError
    from softprompt.patching import patch, patched, unpatch
    from softprompt.prompts import export, init
    from softprompt.prompts.inspection import inspect_prompt
    from softprompt.report import explain

__version__ = "0.1.0"

__all__ = [
    "UnsupportedModelError",
    "ensemble",
    "explain",
    "export",
    "forward",
    "init",
    "inspect_prompt",
    "multitask",
    "patch",
    "patched",
    "score",
    "unpatch",
]

# Imported on first use: the command line shows its help without waiting for torch.
_HOMES = {
    "UnsupportedModelError": "softprompt.engine.runner",
    "explain": "softprompt.report",
    "export": "softprompt.prompts",
    "forward": "softprompt.engine.forward",
    "init": "softprompt.prompts",
    "inspect_prompt": "softprompt.prompts.inspection",
    "patch": "softprompt.patching",
    "patched": "softprompt.patching",
    "score": "softprompt.engine.candidates",
    "unpatch": "softprompt.patching",
}
_MODULES = ("ensemble", "multitask")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"softprompt.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'softprompt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
