"""Every PEFT model with a prompt is patched where it is made, and what becomes of its calls is counted."""

from __future__ import annotations

import collections
import contextlib
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from peft import PeftType
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

import softprompt
from softprompt import patched_model
from softprompt.state import PatchState

PROMPTS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.MULTITASK_PROMPT_TUNING)


@dataclass
class Counts:
    """What was patched, and who served its calls."""

    models: collections.Counter[str] = field(default_factory=collections.Counter)  # route: class
    calls: collections.Counter[str] = field(default_factory=collections.Counter)  # who served them


@contextlib.contextmanager
def patching() -> Iterator[Counts]:
    """Patches models with a prompt in their constructor, for the duration of a block."""
    counts = Counts()

    def patch_when_made(stock: Any, owner: type) -> Any:
        @functools.wraps(stock)
        def init(self: Any, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
            stock(self, model, peft_config, *args, **kwargs)
            if type(self) is owner and getattr(peft_config, "peft_type", None) in PROMPTS:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    softprompt.patch(self)
                    report = softprompt.explain(self)
                counts.models[f"{report.route}: {type(self).__name__}"] += 1
                if report.route == "stock":
                    counts.calls[f"not patched: {report.reason}"] += 1

        return init

    def counted(owner: Any, name: str, what: str) -> Any:
        stock = getattr(owner, name)

        @functools.wraps(stock)
        def call(*args: Any, **kwargs: Any) -> Any:
            counts.calls[what] += 1
            return stock(*args, **kwargs)

        return mock.patch.object(owner, name, call)

    def fall_back(state: PatchState, reason: str, names: Any, method: str = "forward") -> None:
        counts.calls[f"PEFT's own {method}: {reason}"] += 1
        own_fall_back(state, reason, names, method)

    own_fall_back = PatchState.fall_back
    with contextlib.ExitStack() as stack:
        for owner in {*MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}:
            stack.enter_context(mock.patch.object(owner, "__init__", patch_when_made(owner.__init__, owner)))
        causal, encoder_decoder = patched_model.PatchedCausalLM, patched_model.PatchedSeq2SeqLM
        stack.enter_context(counted(causal, "_run", "fast forward of a causal model"))
        stack.enter_context(counted(patched_model, "_generate", "fast generate of a causal model"))
        stack.enter_context(counted(encoder_decoder, "_run", "fast forward of an encoder-decoder"))
        stack.enter_context(mock.patch.object(PatchState, "fall_back", fall_back))
        yield counts
