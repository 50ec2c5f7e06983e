"""The name under which transformers hands a cache around: 5.24 renamed it."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import GenerationMixin

OLD = "past_key_values"


def _has_new_name(function: object) -> bool:
    return "cache" in inspect.signature(function).parameters  # type: ignore[arg-type]


CACHE = "cache" if _has_new_name(GenerationMixin.prepare_inputs_for_generation) else OLD
NAMES = tuple(dict.fromkeys((CACHE, OLD)))  # of the user's argument


def cache_argument(module: nn.Module) -> str:
    """The name of the cache among the arguments of a forward; code from elsewhere may have the old one."""
    return "cache" if _has_new_name(type(module).forward) else OLD
