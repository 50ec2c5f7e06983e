"""Whether a model is still the one that was looked at: cheap enough to ask at every step."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from softprompt.engine.attributes import Attributes
from softprompt.engine.leftovers import LEFT

_TABLES = ("_modules", "_parameters", "_buffers")
_END = object()
_REQUIRES_GRAD = operator.attrgetter("requires_grad")
_TRAINING = operator.itemgetter("training")
# What PEFT's layers (a frozen LoRA in the base) look at when they are called, beside their weights.
_ADAPTERS = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_setting(name: str, value: Any) -> bool:
    """Whether an attribute is a setting of dropout, router noise or checkpointing."""
    if name == "gradient_checkpointing":
        return True
    return isinstance(value, float | int) and (name == "p" or "drop" in name or "jitter" in name)


def _passing(module: nn.Module) -> set[str]:
    """Attributes that go to and fro: steps are recorded for each of their values (`Watch.mode`)."""
    names = {name for name, value in vars(module).items() if _is_setting(name, value)}
    return names | {"training", LEFT} | (set(_ADAPTERS) if "_active_adapter" in vars(module) else set())


class Sight(NamedTuple):
    """What there is to see of a model."""

    same: bool  # its structure
    hooked: bool  # some module does more than its class says


class Watch:
    """What a recorded step takes for granted of a model.

    That is: its modules, their classes, attributes and configurations, the storage of its parameters and
    buffers and whether they want a gradient, hooks and forwards set on instances, training flags, the random
    settings of modules, and the switches of adapter layers. It is asked from flat lists.
    """

    def __init__(self, model: nn.Module) -> None:
        # The model may hold its watch: without its own dictionary in here it goes when it is let go.
        root, *others = model.modules()
        self._root = weakref.ref(root)
        self._others = [module.__dict__ for module in others]
        states = self._states()
        tables = [state[name] for state in states for name in _TABLES]
        # Most are empty, and only looked at for that.
        self._tables = [table for table in tables if table]
        self._empty = [table for table in tables if not table]
        self._hooks = [state[name] for state in states for name in _HOOKS]
        # Kept alive, so that an identity belongs to nothing else in the meantime.
        self._values = [*self._now_values(), _END]
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._modules = [value for value in self._values if isinstance(value, nn.Module)]
        self._classes = self._now_classes()
        self._configured = [place for place, state in enumerate(states) if "config" in state]
        self._configs = self._now_configs()
        self._places = self._now_places()
        self._attributes = Attributes(root, _passing)
        self._held = self._now_held()
        self._sight: Sight | None = None
        self.notes: dict[Any, Any] = {}  # what others found out about the model as it is; not the model
        # The settings of dropout, router noise and checkpointing: (place of the module, attribute).
        settings = [
            (place, name)
            for place, state in enumerate(states)
            for name, value in state.items()
            if _is_setting(name, value)
        ]
        self._setting_places = [place for place, _ in settings]
        self._setting_names = [name for _, name in settings]
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

    def _now_values(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(map(dict.values, self._tables))

    def _now_classes(self) -> list[type]:
        return [type(self._root()), *map(type, self._modules)]

    def _now_configs(self) -> list[Any]:
        holders = map(self._states().__getitem__, self._configured)
        return list(map(dict.get, holders, itertools.repeat("config")))

    def _now_places(self) -> tuple[list[int], list[bool]]:
        return list(map(Tensor.data_ptr, self._tensors)), list(map(_REQUIRES_GRAD, self._tensors))

    def _now_held(self) -> list[int]:
        """Places of tensors that are plain attributes."""
        return [tensor.data_ptr() for tensor in self._attributes.tensors() if type(tensor) is Tensor]

    def same_structure(self) -> bool:
        """Whether modules, parameters, buffers and configurations are the same objects, the modules of the
        same classes, and the tensors at the same place in memory.
        """
        values = itertools.chain(self._now_values(), (_END,))
        return (
            not any(self._empty)
            and all(map(operator.is_, values, self._values))
            and self._now_classes() == self._classes
            and all(map(operator.is_, self._now_configs(), self._configs))
            and self._now_places() == self._places
            and self._attributes.same()
            and self._now_held() == self._held
        )

    @property
    def unseen(self) -> str | None:
        """What may change without being seen, in half a sentence, or None."""
        return self._attributes.unseen

    def has_hooks(self) -> bool:
        """Whether any module does more than its class says when it is called."""
        replaced = map(operator.contains, self._states(), itertools.repeat("forward"))
        return any(self._hooks) or any(replaced)

    def look(self) -> Sight:
        """Looks at structure and hooks, and keeps what it sees for `last_look`."""
        self._sight = Sight(self.same_structure(), self.has_hooks())
        return self._sight

    def last_look(self) -> Sight:
        """What `look` saw in this call of the model, which may be asked for once; else what it sees now."""
        sight = self._sight or self.look()
        self._sight = None
        return sight

    def mode(self) -> tuple[Any, ...]:
        """Training flags and settings, to be compared with those of another time."""
        states = self._states()
        flags = tuple(map(_TRAINING, states))
        holders = map(states.__getitem__, self._setting_places)
        settings = tuple(map(dict.get, holders, self._setting_names))
        return (flags, settings, tuple(repr(states[place].get(name)) for place, name in self._adapters))


HOOKED = "modules of the language model have hooks or a replaced forward"


def process_obstacle() -> str | None:
    """What looks at every module or operation of the process and may change it, as a sentence, or None."""
    module = nn.modules.module
    if (
        module._global_forward_hooks
        or module._global_forward_pre_hooks
        or module._global_backward_hooks
        or module._global_backward_pre_hooks
    ):
        return HOOKED
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    foreign = [type(mode).__name__ for mode in modes if not isinstance(mode, DeviceContext)]
    return f"a mode of PyTorch is on ({', '.join(foreign)})" if foreign else None


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
