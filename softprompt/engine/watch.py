"""Whether a model is still the one that was looked at: cheap enough to ask at every step."""

from __future__ import annotations

import itertools
import operator
import weakref
from typing import Any

from torch import Tensor, nn

_TABLES = ("_modules", "_parameters", "_buffers")
_REQUIRES_GRAD = operator.attrgetter("requires_grad")
_TRAINING = operator.itemgetter("training")
# What PEFT's layers (a frozen LoRA in the base) look at when they are called, beside their weights.
_ADAPTERS = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """What a recorded step takes for granted of a model.

    That is: its modules, the storage of its parameters and buffers and whether they want a gradient, hooks
    and forwards set on instances, training flags, the random settings of modules, and the switches of adapter
    layers. It is asked from flat lists, without a Python loop: some 0.1 ms for 32 layers.
    """

    def __init__(self, model: nn.Module) -> None:
        # The model may hold its watch: without its own dictionary in here it goes when it is let go.
        root, *others = model.modules()
        self._root = weakref.ref(root)
        self._others = [module.__dict__ for module in others]
        states = self._states()
        self._tables = [state[name] for state in states for name in _TABLES]
        self._hooks = [state[name] for state in states for name in _HOOKS]
        # Kept alive, so that an identity belongs to nothing else in the meantime.
        self._values = list(itertools.chain.from_iterable(table.values() for table in self._tables))
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._identities = self._now_identities()
        self._places = self._now_places()
        # The settings of dropout, router noise and checkpointing: (place of the module, attribute).
        self._settings = [
            (place, name)
            for place, state in enumerate(states)
            for name, value in state.items()
            if name == "gradient_checkpointing"
            or (isinstance(value, float | int) and (name == "p" or "drop" in name or "jitter" in name))
        ]
        # By their text, since some are lists and dicts that are changed in place.
        self._adapters = [
            (place, name)
            for place, state in enumerate(states)
            if "_active_adapter" in state
            for name in _ADAPTERS
        ]

    def _states(self) -> list[dict[str, Any]]:
        """The attributes of each module, the model's first."""
        return [vars(self._root()), *self._others]

    def _now_identities(self) -> list[int]:
        return list(map(id, itertools.chain.from_iterable(map(dict.values, self._tables))))

    def _now_places(self) -> tuple[list[int], list[bool]]:
        return list(map(Tensor.data_ptr, self._tensors)), list(map(_REQUIRES_GRAD, self._tensors))

    def same_structure(self) -> bool:
        """Whether modules, parameters and buffers are the same objects at the same place in memory."""
        return self._now_identities() == self._identities and self._now_places() == self._places

    def has_hooks(self) -> bool:
        """Whether any module does more than its class says when it is called."""
        replaced = map(operator.contains, self._states(), itertools.repeat("forward"))
        return any(self._hooks) or any(replaced)

    def mode(self) -> tuple[Any, ...]:
        """Training flags and settings, to be compared with those of another time."""
        states = self._states()
        flags = tuple(map(_TRAINING, states))
        settings = tuple(states[place].get(name) for place, name in self._settings)
        return (flags, settings, tuple(repr(states[place].get(name)) for place, name in self._adapters))


def shared_device_obstacle(model: nn.Module) -> str | None:
    """Why the weights of a model do not simply lie on one device, or None."""
    devices, kinds = set(), set()
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        devices.add(str(tensor.device))
        if type(tensor) not in (Tensor, nn.Parameter):
            kinds.add(type(tensor).__name__)
    if kinds:
        return f"weights are of type {', '.join(sorted(kinds))}"
    if len(devices) > 1:
        return f"weights lie on several devices ({', '.join(sorted(devices))})"
    return None
