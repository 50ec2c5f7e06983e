"""PEFT's own `generate`, which asks the cache in every step whether the prompt is in it already.

Where it gets no answer, it puts the prompt in front of every new token, and the tokens are wrong without a
word.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from peft import PeftModelForCausalLM
from transformers import DynamicCache

from softprompt.engine.caches import CACHE, OLD
from softprompt.engine.model_spec import CausalLM
from softprompt.state import state_of

# transformers 5.24 renamed the cache; a PEFT that looks for the old name does not find it.
PEFT_KNOWS_CACHE = CACHE == OLD or f'"{CACHE}"' in inspect.getsource(
    PeftModelForCausalLM.prepare_inputs_for_generation
)


def step_inputs(
    model: PeftModelForCausalLM, stock: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """PEFT's `prepare_inputs_for_generation`, which finds the cache under the name that it looks for.

    Args:
        model: the PEFT model.
        stock: PEFT's method.
        args: its arguments by place.
        kwargs: its arguments by name.
    """
    if PEFT_KNOWS_CACHE:
        return stock(*args, **kwargs)
    inner = model.base_model_prepare_inputs_for_generation
    was_renamed = False

    def renamed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        nonlocal was_renamed
        inputs: dict[str, Any] = inner(*args, **kwargs)
        if CACHE in inputs:
            inputs[OLD] = inputs.pop(CACHE)
            was_renamed = True
        return inputs

    model.base_model_prepare_inputs_for_generation = renamed
    try:
        inputs = stock(*args, **kwargs)
    finally:
        model.base_model_prepare_inputs_for_generation = inner
    if was_renamed and OLD in inputs:
        inputs[CACHE] = inputs.pop(OLD)
    return inputs


def tells_its_length(model: CausalLM) -> bool:
    """Whether the cache that `generate` makes for a causal LM says how many tokens it holds.

    One that holds recurrent states alone does not, and models with a cache of their own kind do not use one.
    """
    if not model._supports_default_dynamic_cache():
        return False
    try:
        DynamicCache(config=model.config.get_text_config(decoder=True)).get_seq_length()
    except ValueError:
        return False
    return True


def right_options(model: Any) -> dict[str, Any]:
    """The arguments with which `generate` of a model is right: no cache where PEFT's own would misread it.

    Args:
        model: an unpatched PEFT model; a patched one and a bare causal LM need none.
    """
    if state_of(model) is not None or not isinstance(model, PeftModelForCausalLM):
        return {}
    return {} if PEFT_KNOWS_CACHE and tells_its_length(model.get_base_model()) else {"use_cache": False}
