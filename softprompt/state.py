"""What a patched model carries beside its class."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModelForSeq2SeqLM
from torch import Tensor, nn

from softprompt.engine import Plan, model_spec, plan_for, sharding
from softprompt.engine.model_spec import CausalLM
from softprompt.engine.runner import ModelRunner, RunOptions, UnsupportedModelError
from softprompt.generation.prompt_cache import CachedPrompt
from softprompt.nesting import base_of
from softprompt.warn import warn

STATE = "_softprompt"
_NUMBERS = itertools.count()
_MODELS: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()
_PACKED = "the packed row draws the prompt's masks once per step where PEFT draws them per row"


@dataclass(frozen=True)
class PatchOptions(RunOptions):
    """What `patch` was asked for."""

    on_unsupported: str = "fallback"
    cuda_graphs: bool = True
    compile: bool = False
    fused: bool = True
    placement: str = "prefix"

    @property
    def without_stock(self) -> str | None:
        """The option that PEFT's own forward does not know, None where it knows all."""
        if self.positions == "compact":
            return 'positions="compact"'
        return None if self.placement == "prefix" else f'placement="{self.placement}"'


@dataclass
class PatchState:
    """What a patched instance carries beside its class: options, what it keeps, and the fallbacks met."""

    options: PatchOptions
    stock_class: type
    runner: ModelRunner | None = None
    tokens: dict[str, tuple[Tensor, int, Tensor]] = field(default_factory=dict)  # see `tokens_of`
    prompts: dict[str, CachedPrompt] = field(default_factory=dict)  # adapter -> for generate
    refusal: str | None = None  # why the class was left alone
    fallbacks: dict[str, int] = field(default_factory=dict)  # reason -> number of calls
    said: set[str] = field(default_factory=set)  # notes that were given once
    name: str = field(default_factory=lambda: str(next(_NUMBERS)))  # see `model_named`

    def fall_back(self, reason: str, adapter_names: Sequence[str] | None, method: str = "forward") -> None:
        """Notes that a call is PEFT's, with one warning for each reason.

        Raises:
            UnsupportedModelError: PEFT cannot serve the call, or the patch does not allow it.
        """
        if self.options.on_unsupported == "error":
            raise UnsupportedModelError(f"softprompt: {reason}")
        if self.options.without_stock is not None:
            raise UnsupportedModelError(
                f"softprompt: {self.options.without_stock} has no stock {method} to fall back to: {reason}"
            )
        if adapter_names is not None:
            raise UnsupportedModelError(
                f"softprompt: adapter_names has no stock {method} to fall back to: {reason}"
            )
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1
        # `patch` has said why forward is PEFT's.
        note = reason if method == "forward" else f"{method}: {reason}"
        self.say_once(note, f"PEFT's own {method} was used: {reason}")

    def say_once(self, note: str, message: str | None = None) -> None:
        """One warning for a note, with a message that is longer than the note."""
        if note not in self.said:
            self.said.add(note)
            warn(message or note)

    def say_dropout(self, base: CausalLM, why: str = _PACKED) -> None:
        """One warning where the language model has dropout."""
        if "dropout" in self.said:
            return
        self.said.add("dropout")  # also where there is none: it is looked for once
        active = model_spec.dropout_of(base)
        if active:
            warn(
                f"the frozen model has dropout ({', '.join(active)}) and is in training mode: {why} "
                "(same expectation, other numbers); model.eval() or p = 0 gives PEFT's numbers"
            )

    def runner_of(self, base: CausalLM) -> ModelRunner:
        """What runs batches on the language model."""
        if self.runner is None or not self.runner.is_of(base):
            options = self.options
            self.runner = ModelRunner(
                base, cuda_graphs=options.cuda_graphs, compile=options.compile, fused=options.fused
            )
        return self.runner


def state_of(model: nn.Module) -> PatchState | None:
    """The patch state of a model, None where it is not patched."""
    return model.__dict__.get(STATE)


def plan_of(model: Any) -> Plan:
    """The plan of a PEFT model's language model, patched or not."""
    base, sharded, state = base_of(model), sharding.is_fsdp(model), state_of(model)
    if isinstance(model, PeftModelForSeq2SeqLM):
        return plan_for(base, encoder_decoder=True, sharded=sharded)
    if state is None:
        return plan_for(base, sharded=sharded)
    return state.runner_of(base).plan(sharded=sharded)


def give_state(model: nn.Module, state: PatchState) -> None:
    """Makes this the state of a model, in place of one that it has."""
    take_state(model)
    setattr(model, STATE, state)
    _MODELS[state.name] = model


def take_state(model: nn.Module) -> None:
    """Takes the state of a model away."""
    state: PatchState | None = model.__dict__.pop(STATE, None)
    if state is not None and _MODELS.get(state.name) is model:
        del _MODELS[state.name]


def model_named(name: str) -> Any:
    """The model whose state has this name: what is traced may be handed a string, but no model."""
    return _MODELS[name]
