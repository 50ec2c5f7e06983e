"""The transformers model at the bottom of a PEFT model, and the PEFT models between the two.

A prompt may stand over another PEFT model (`get_peft_model(get_peft_model(base, LoraConfig(...)),
PromptTuningConfig(...))`). PEFT's `get_base_model()` is then that other model. Its layers live in the model
at the bottom, which is the one that the engine runs.
"""

from __future__ import annotations

from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from softprompt.engine import sharding
from softprompt.engine.model_spec import CausalLM


def base_of(model: nn.Module) -> CausalLM:
    """The language model inside of PEFT models and of `torch.compile`; another model is its own."""
    base: CausalLM = _chain(model)[-1]
    return base


def is_nested(model: PeftModel) -> bool:
    """Whether another PEFT model lies between a PEFT model with a prompt and the language model."""
    return any(isinstance(link, PeftModel | PeftMixedModel) for link in _links(model))


def has_prompt_below(model: PeftModel) -> bool:
    """Whether one of those has a prompt of its own."""
    return any(_has_prompt(link) for link in _links(model))


def nesting_obstacle(model: PeftModel) -> str | None:
    """Why what lies between a PEFT model and the language model cannot be skipped, as a sentence, or None.

    Layers that were put into the language model, such as LoRA's, are called by it and need nothing else.
    """
    for link in _links(model):
        name = type(link).__name__
        if _has_prompt(link):
            return f"a {name} with a prompt of its own lies below it, which the fast route would skip"
        if sharding.has_foreign_hooks(link):
            return f"a {name} below it has hooks or a replaced forward, which the fast route would skip"
        forward: Any = type(link).forward
        if isinstance(link, BaseTuner):
            if forward is not BaseTuner.forward:
                return f"a {name} below it does more than its layers in the language model"
            if any(getattr(config, "alora_invocation_tokens", None) for config in link.peft_config.values()):
                return "an activated LoRA below it is told outside of the language model where it begins"
        elif forward.__module__.split(".")[0] not in ("peft", "softprompt"):
            return f"a {name} below it has a forward of its own, which the fast route would skip"
    return None


def _links(model: PeftModel) -> list[nn.Module]:
    """What lies between a PEFT model and the language model."""
    own = 1 if _has_prompt(model) else 2  # a tuner belongs to its PEFT model
    return _chain(model)[own:-1]


def _chain(model: nn.Module) -> list[Any]:
    """A model, and what it wraps, down to the language model."""
    chain: list[Any] = [model]
    while True:
        last = chain[-1]
        # Not `get_base_model`: a LoRA over a prompt under the same name puts its configuration in that one's
        # place, and the prompt's model then looks inside of the language model.
        if isinstance(last, PeftModel | PeftMixedModel):
            chain.append(last.base_model)
            if not _has_prompt(last):
                chain.append(last.base_model.model)
        elif "_orig_mod" in getattr(last, "_modules", ()):
            chain.append(last._orig_mod)  # of torch.compile
        else:
            return chain


def _has_prompt(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) and bool(vars(model).get("_is_prompt_learning"))
