"""Who runs a case: each variant makes a PEFT model that is trained by the same loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import PromptTuningConfig, get_peft_model
from transformers import PreTrainedModel

import softprompt


@dataclass(frozen=True)
class Variant:
    """One way to run a step."""

    name: str
    about: str
    build: Callable[[PreTrainedModel, PromptTuningConfig], Any]  # takes the base model, which variants share


def _patched(base: PreTrainedModel, config: PromptTuningConfig) -> Any:
    return softprompt.patch(get_peft_model(base, config), on_unsupported="error")


REFERENCE = Variant("peft", "PEFT as users run it", get_peft_model)
VARIANTS = (REFERENCE, Variant("softprompt", "the same after softprompt.patch(model)", _patched))
