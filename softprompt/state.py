"""What a patched model carries beside its class."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from softprompt.engine.runner import ModelRunner, RunOptions
from softprompt.generation import KnownPrompt

STATE = "_softprompt"
_NUMBERS = itertools.count()
_MODELS: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class PatchOptions(RunOptions):
    """What `patch` was asked for."""

    on_unsupported: str = "fallback"
    cuda_graphs: bool = True
    compile: bool = False
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
    prompts: dict[str, KnownPrompt] = field(default_factory=dict)  # adapter -> for generate
    refusal: str | None = None  # why the class was left alone
    fallbacks: dict[str, int] = field(default_factory=dict)  # reason -> number of calls
    said: set[str] = field(default_factory=set)  # notes that were given once
    name: str = field(default_factory=lambda: str(next(_NUMBERS)))  # see `model_named`


def state_of(model: nn.Module) -> PatchState | None:
    """The patch state of a model, None where it is not patched."""
    return model.__dict__.get(STATE)


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


def model_named(name: str) -> nn.Module:
    """The model whose state has this name: what is traced may be handed a string, but no model."""
    return _MODELS[name]


def runner_of(model: Any, base: nn.Module) -> ModelRunner:
    """What runs the batches of a patched model."""
    state: PatchState = model._softprompt
    if state.runner is None or not state.runner.is_of(base):
        state.runner = ModelRunner(base, cuda_graphs=state.options.cuda_graphs, compile=state.options.compile)
    return state.runner
