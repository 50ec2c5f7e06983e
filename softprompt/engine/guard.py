"""Whether a model has changed since: asked before what was found out about it is used again.

There are three levels. `Guard.check` compares modules, attributes, code, weights and hooks, and is cheap
enough for every step. `Guard.mode` are the flags and settings that go to and fro: steps are recorded for each
of their values. `Guard.snapshot` adds numbers of the weights, for what is kept from call to call.
"""

from __future__ import annotations

import itertools
import operator
import sys
import types
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import GenerationMixin

from softprompt.engine import attention_modules, model_records, model_spec, sharding
from softprompt.engine.model_spec import CausalLM
from softprompt.engine.overrides import has_global_hooks
from softprompt.engine.reads import (
    ADAPTERS,
    ATOMS,
    OF_CALLS,
    Reads,
    attention_functions,
    is_compilers,
    is_setting,
)
from softprompt.engine.structure import structure_of

HOOKED = "modules of the language model have hooks or a replaced forward"

_DEVICE, _DTYPE = operator.attrgetter("device"), operator.attrgetter("dtype")
_REQUIRES_GRAD, _VERSION = operator.attrgetter("requires_grad"), operator.attrgetter("_version")
_PLAIN = (bool, int, float, str, bytes)
_GONE = object()
_SAMPLES = 16  # numbers of each weight
_NUMBERS = itertools.count()


class GuardResult(NamedTuple):
    """The state of a model: while it equals an earlier one, the model has not changed.

    A number stands for one state of one model, and never for another.
    """

    model: int  # modules, their classes and attributes, configurations and code
    weights: int  # tensors, their place in memory and dtype, and whether they want a gradient
    hooks: int  # of modules
    hooked: bool  # some module does more than its class says


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A model as `check` sees it, its flags and settings, and numbers of its weights."""

    state: tuple[Any, ...]
    samples: list[Tensor]  # of the weights, by device
    # The model may compute something else although nothing of it has changed: hooks, and code that is none
    # of the libraries', may look at anything.
    is_open: bool

    def same(self, other: Snapshot) -> bool:
        """Whether the model had not changed between them."""
        return (self.state, self.is_open) == (other.state, other.is_open) and all(
            map(torch.equal, self.samples, other.samples)
        )


# How much values have changed: not at all, tensors that are others, simple values, or what holds more.
_NOTHING, _TENSORS, _VALUES, _MORE = range(4)


class _Weak(weakref.ref[Any]):
    """Told apart from a weak reference that is itself a value of the model."""

    __slots__ = ()


class _Values:
    """Values as they were, compared by identity, and held weakly where that is possible."""

    def __init__(self, values: list[Any]) -> None:
        self.gone: list[Any] = []  # while there are any, an identity may belong to another value
        self._keep_all(values)

    def _keep_all(self, values: list[Any]) -> None:
        self._ids = list(map(id, values))
        self._kept = list(map(self._keep, values))
        self._ranks = list(map(_rank, values))
        self._tensors = [kept for kept, rank in zip(self._kept, self._ranks, strict=True) if rank == _TENSORS]
        self.gone.clear()

    def _keep(self, value: Any) -> Any:
        try:
            return _Weak(value, self.gone.append)
        except TypeError:
            return value

    def tensors(self) -> list[Tensor]:
        """The tensors among them."""
        return [reference() for reference in self._tensors]

    def update(self, values: list[Any], *, may_grow: bool = False) -> int:
        """Takes over other values, and says how much has changed."""
        if not self.gone and list(map(id, values)) == self._ids:
            return _NOTHING
        if len(values) == len(self._ids):
            change = self._change_at_places(values)
        else:
            change = self._change_of_all(values) if may_grow else _MORE
        self._keep_all(values)
        return change

    def _change_at_places(self, values: list[Any]) -> int:
        change = _NOTHING
        for value, kept, rank in zip(values, self._kept, self._ranks, strict=True):
            before = _alive(kept)
            # A number or a name that is set to what it was is the same.
            if value is not before and not (
                type(value) is type(before) and isinstance(value, _PLAIN) and value == before
            ):
                change = max(change, rank, _rank(value))
        return change

    def _change_of_all(self, values: list[Any]) -> int:
        """Where there are more or fewer, whatever their order."""
        before = {id(_alive(kept)): rank for kept, rank in zip(self._kept, self._ranks, strict=True)}
        now = {id(value): _rank(value) for value in values}
        return max((_VALUES, *((before | now)[number] for number in before.keys() ^ now.keys())))


def _rank(value: Any) -> int:
    return _TENSORS if isinstance(value, Tensor) else _VALUES if isinstance(value, ATOMS) else _MORE


def _alive(kept: Any) -> Any:
    if type(kept) is not _Weak:
        return kept
    value = kept()
    return _GONE if value is None else value


def guard_of(model: nn.Module) -> Guard:
    """The guard of a model or a part of it, which there is one of."""
    return model_records.kept(model, "guard", None, lambda: Guard(model))


class Guard:
    """Sees whether a model, or a part of one, has changed.

    It keeps no module, weight, hook or closure alive, and so may be kept by model. It compares flat lists,
    and lists anew what there is to compare where a change may have brought something.

    Args:
        root: the model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root: weakref.ref[Any] = weakref.ref(root)
        self._kinds: list[type] = []
        self._dense: list[int] = []
        self._hooks: list[int] = []
        self._hooks_number = next(_NUMBERS)
        self._read(root)

    # -------------------------------------------------------------------------------------------- the levels
    def check(self) -> GuardResult:
        """The state of the model as it is now."""
        now = self._reads.now()
        if now is None or not self._follows(*now):
            self._read(self._root())
        if self._weights_now() != self._weights:
            self._find_weights()
        if self._reads.hooks != self._hooks:
            self._hooks, self._hooks_number = self._reads.hooks, next(_NUMBERS)
        replaced = any("forward" in vars(reference()) for reference in self._generating)
        hooked = bool(self._hooks) or self._has_forward or replaced
        return GuardResult(self._model_number, self._weights_number, self._hooks_number, hooked)

    def in_place(self, state: GuardResult) -> bool:
        """Whether the weights of a state are alive and lie where they did, so that they can be read there;
        False also where a later `check` has seen other weights.
        """
        weights = self._tensors()
        if state.weights != self._weights_number or self._values.gone or self._contents.gone:
            return False
        return self._places(weights) == self._weights[2]

    def mode(self) -> tuple[Any, ...]:
        """Training flags at the last `check`, settings of dropout and the like, and switches of adapters."""
        settings = tuple(vars(reference()).get(name) for reference, name in self._settings)
        # By their text, since some are lists and dicts that are changed in place.
        adapters = tuple(repr(vars(reference()).get(name)) for reference, name in self._adapters)
        return tuple(self._reads.training), settings, adapters

    def snapshot(self) -> Snapshot:
        """The model as it is now, with some values of each weight."""
        result, weights = self.check(), self._tensors()
        counted = [tensor for tensor in weights if not tensor.is_inference()]
        device_types = {tensor.device.type for tensor in weights} - {"meta"}
        autocast = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in sorted(device_types)
            if torch.is_autocast_enabled(kind)
        ]
        return Snapshot(
            (
                *(result.model, result.weights, self.mode(), autocast, list(map(_DEVICE, weights))),
                *(list(map(_VERSION, counted)), [weight.numel() for weight in weights if _is_dense(weight)]),
            ),
            _samples_of(weights),
            self._reads.foreign is not None or process_obstacle() is not None or result.hooked,
        )

    @property
    def unseen(self) -> str | None:
        """What code from elsewhere holds that may change without being seen, in half a sentence, or None."""
        foreign, unseen = self._reads.foreign, self._reads.unseen
        return f"{foreign} holds {unseen[0]}" if foreign and unseen else None

    # ------------------------------------------------------------------------------- what there is to compare
    def _read(self, root: Any) -> None:
        """Finds out what there is to compare."""
        self._reads = Reads(root)
        now = self._reads.now()
        if now is None:
            raise RuntimeError("the model was changed by another thread while it was looked at")
        self._values, self._contents = map(_Values, now)
        self._model_number = next(_NUMBERS)
        modules = [(reference, vars(reference())) for reference in self._reads.modules]
        # An attribute that is added to one of these is not seen as it is elsewhere.
        self._generating = [reference for reference, _ in modules if isinstance(reference(), GenerationMixin)]
        self._has_forward = any("forward" in state for _, state in modules)
        self._settings = [
            (reference, name)
            for reference, state in modules
            for name, value in state.items()
            if is_setting(name, value)
        ]
        self._adapters = [
            (reference, name)
            for reference, state in modules
            if "_active_adapter" in state
            for name in ADAPTERS
        ]
        self._find_weights()

    def _follows(self, values: list[Any], contents: list[Any]) -> bool:
        """Takes over what has changed. False: what is new may hold more, which has to be compared too."""
        change = max(self._values.update(values), self._contents.update(contents, may_grow=True))
        if change >= _TENSORS:
            self._find_weights()
        if change >= _VALUES:
            self._model_number = next(_NUMBERS)
        return change < _MORE

    def _find_weights(self) -> None:
        self._weights = self._weights_now()
        self._weights_number = next(_NUMBERS)

    def _tensors(self) -> list[Tensor]:
        return [*self._values.tensors(), *self._contents.tensors()]

    def _weights_now(self) -> tuple[list[Any], ...]:
        weights = self._tensors()
        kinds = list(map(type, weights))
        if kinds != self._kinds:
            self._kinds = kinds
            self._dense = [place for place, weight in enumerate(weights) if _is_dense(weight)]
        return kinds, list(map(_DTYPE, weights)), self._places(weights), list(map(_REQUIRES_GRAD, weights))

    def _places(self, weights: list[Tensor]) -> list[int]:
        dense = weights if len(self._dense) == len(weights) else map(weights.__getitem__, self._dense)
        return list(map(Tensor.data_ptr, dense))


def _is_dense(weight: Tensor) -> bool:
    """Whether a tensor can be asked for its place in memory."""
    return type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided


def _samples_of(weights: list[Tensor]) -> list[Tensor]:
    """Some numbers of each, by device: they show what was written through `.data`, which has no version."""
    samples: dict[torch.device, list[Tensor]] = {}
    with torch.no_grad():
        for weight in weights:
            # Numbers of one byte can neither be joined with others nor compared everywhere.
            if _is_dense(weight) and weight.is_floating_point() and weight.element_size() > 1:
                values = weight if weight.is_contiguous() else weight.contiguous()
                step = -(-values.numel() // _SAMPLES) or 1
                picked = values.as_strided((-(-values.numel() // step),), (step,))
                samples.setdefault(weight.device, []).append(picked)
        return [torch.cat(parts) for parts in samples.values()]


def process_obstacle() -> str | None:
    """What acts on every module or operation of the process and may change it, as a sentence, or None."""
    if has_global_hooks():
        return HOOKED
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    foreign = [type(mode).__name__ for mode in modes if not isinstance(mode, DeviceContext)]
    return f"a mode of PyTorch is on ({', '.join(foreign)})" if foreign else None


# ------------------------------------------------------------------------------------------------ of the plan
def plan_key(model: CausalLM) -> tuple[tuple[Any, ...], GuardResult | None]:
    """What the route of a model depends on, in two halves: FSDP2 changes the second one. And the state of the
    model that was looked at, None where it has no fast route whatever its state.
    """
    obstacle = sharding.obstacle(model)
    if obstacle is not None:  # which may be written on a weight, and copies of a step are not worth a guard
        return ((obstacle,), ()), None
    result = guard_of(model).check()
    key = model_records.kept(model, "plan key", result, lambda: (_lasting(model), _passing(model)))
    return key, result


def _lasting(model: CausalLM) -> tuple[Any, ...]:
    config = model_spec.config_of(model)
    try:
        body = model_spec.body_of(model)
    except AttributeError:  # then there is no route, and no positions
        body = None
    model_type = getattr(config, "model_type", None)
    return (
        getattr(model.config, "_attn_implementation", None) if hasattr(model, "config") else None,
        bool(getattr(getattr(model, "config", None), "output_router_logits", False)),
        *(id(getattr(model, name, bool)()) for name in ("get_input_embeddings", "get_output_embeddings")),
        id(getattr(model, "_loss_function", None)),
        # Such as the scale of the logits and the length of the positions.
        _settings(model, _PLAIN),
        _settings(config, (*_PLAIN, list, dict)),
        attention_modules.obstacle(body, model_type)
        if body is not None and model_type in attention_modules.FAMILIES
        else None,
        None if body is None else model_spec.takes_position_ids(body),
        _functions(model),
    )


def _settings(holder: Any, kinds: tuple[type, ...]) -> list[tuple[str, str]]:
    return [
        (name, repr(value))
        for name, value in getattr(holder, "__dict__", {}).items()
        if name[0] != "_" and name not in (*OF_CALLS, "training") and isinstance(value, kinds)
    ]


def _passing(model: CausalLM) -> tuple[Any, ...]:
    weight = next(iter(model.parameters()), None)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    structure, modules = structure_of(model)
    return (
        None if weight is None else (weight.dtype, weight.device.type),
        structure,
        # Quantisers exchange weights and leave their modules.
        frozenset(type(module._parameters.get("weight")) for module in modules),
        model_spec.embedding_obstacle(embedding) if isinstance(embedding, nn.Module) else None,
        model_spec.head_obstacle(model) if hasattr(model, "get_output_embeddings") else None,
        sharding.has_parts(model),
    )


def _functions(model: nn.Module) -> tuple[Any, ...]:
    """The functions that the packed row calls or stands in for, which kernel libraries exchange: forwards of
    classes, the code of transformers' model files, attention functions, and PyTorch's below them.

    Told apart by identity and code: a function that is held here may hold the model.
    """
    structure, modules = structure_of(model)
    every = dict.fromkeys(base for kind in dict.fromkeys(map(type, modules)) for base in kind.__mro__)
    # Without those that FSDP2 derives, whose modules are the same.
    bases = [base for base in every if not base.__module__.startswith("torch.distributed.")]
    files = {base.__module__ for base in bases if base.__module__.startswith("transformers.models.")}
    functions: list[Any] = [vars(base).get("forward") for base in bases]
    for holder in (
        *map(sys.modules.get, sorted(files)),
        *(base for base in bases if base.__module__ in files),
    ):
        functions += [
            value
            for name, value in vars(holder).items()
            if isinstance(value, types.FunctionType) and (isinstance(holder, type) or not is_compilers(name))
        ]
    functions += attention_functions(
        getattr(config, "_attn_implementation", None) for config in structure.configs
    )
    functions += [nn.functional.scaled_dot_product_attention, nn.functional.cross_entropy]
    return tuple({id(function): getattr(function, "__code__", None) for function in functions}.items())
