"""What the code of a model reads when it runs, beside hooks: to be compared with what it was.

Code of the libraries below computes with nothing but its modules' attributes and weights, the configuration,
and what is named in its own files. Code from elsewhere may read anything: of that code attributes, closures
and the global names that it mentions are read here too, and `Reads.foreign` says that there is some.
"""

from __future__ import annotations

import collections
import functools
import itertools
import marshal
import operator
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from softprompt.engine.leftovers import LEFT
from softprompt.engine.model_spec import is_library
from softprompt.engine.overrides import HOOKS

STATE = operator.attrgetter("__dict__")
# What PEFT's layers (a frozen LoRA in the base) read when they are called, beside their weights.
ADAPTERS = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
# Of a configuration, and said anew in every call of the engine's.
OF_CALLS = ("use_cache", "return_dict", "output_attentions", "output_hidden_states")
ATOMS = (
    *(bool, int, float, complex, str, bytes, type(None), types.BuiltinFunctionType, types.CodeType),
    *(torch.dtype, torch.device, torch.layout, torch.Generator),
)
SIMPLE = (*ATOMS, Tensor)  # they hold nothing else that would have to be compared
_CONTAINERS = (
    *(dict, list, collections.deque, tuple, set, frozenset),
    *(types.MethodType, functools.partial, property, staticmethod, classmethod),
)
_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType)
_EXACT = frozenset(ATOMS)
_TABLE_TYPES = frozenset((dict, collections.OrderedDict, set))
_STANDARD = frozenset(vars(nn.Module()))
_TABLES = ("_modules", "_parameters", "_buffers")
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
# Of a model that generates these, and numbers, names and switches; others belong to `generate` and trainers.
_OF_MODELS = ("config", "_loss_function")
_END = object()
Source = Callable[[], Iterable[Any]]


def is_setting(name: str, value: Any) -> bool:
    """Whether an attribute is a setting of dropout, router noise or checkpointing."""
    if name == "gradient_checkpointing":
        return True
    return isinstance(value, float | int) and (name == "p" or "drop" in name or "jitter" in name)


def is_compilers(name: str) -> bool:
    """Whether a name in a file was put there by a compiler, which leaves its results beside the code."""
    return name.startswith("__")


def _counts(name: str, value: Any, module: nn.Module) -> bool:
    """Whether an attribute of a module is compared; the others belong to `Guard.mode`, or to calls."""
    if name in _STANDARD or name == LEFT or is_setting(name, value):
        return False
    if type(module) is nn.Linear:
        return name not in ("in_features", "out_features")  # its weight says it
    return not (name in ADAPTERS and "_active_adapter" in vars(module))


def _tables_of(module: nn.Module) -> tuple[str, ...]:
    """The tables of children, parameters and buffers that its code may read."""
    if is_library(type(module).__module__) and not isinstance(module, _LISTS):
        # What is added to an empty one the code does not know of.
        return tuple(name for name in _TABLES if vars(module)[name])
    return _TABLES


def _flag_of(module: nn.Module) -> str:
    """The attribute that holds the training flag. What `torch.compile` makes of a module has that of the
    module inside, which is asked too; another one stands for it.
    """
    return "training" if "training" in vars(module) else "_is_full_backward_hook"


class _Group(NamedTuple):
    """Modules of one class that read the same."""

    members: list[weakref.ref[nn.Module]]
    sizes: list[int] | None  # of their dictionaries; None: of a model, on which others leave what they like
    read: Callable[[dict[str, Any]], tuple[Any, ...]]  # tables, attributes, `training` and hooks
    num_tables: int
    width: int  # tables and attributes


class Reads:
    """Where a model and the code below it find what they compute with.

    Nothing of the model is kept alive: modules, functions and configurations are held weakly, and what lies
    in containers and closures is listed anew each time.

    Args:
        root: the model.
    """

    def __init__(self, root: nn.Module) -> None:
        self.foreign: str | None = None  # a function or class that is none of the libraries'
        self.unseen: list[str] = []  # values whose changes cannot be seen
        self.training: list[bool] = []  # flags of the modules, when `now` was asked last
        self.hooks: list[int] = []  # their numbers then: PyTorch gives each hook one of its own
        self._sources: list[Source] = []
        self._classes: dict[type, None] = {}
        self._seen: dict[int, Any] = {}
        modules = list(root.modules())
        self._seen.update((id(module), module) for module in modules)
        groups: dict[tuple[type, tuple[str, ...], tuple[str, ...]], list[int]] = {}
        for place, module in enumerate(modules):  # grows where attributes hold others
            state = vars(module)
            tables = _tables_of(module)
            if isinstance(module, GenerationMixin):
                self._sources.append(functools.partial(_of_model, weakref.ref(module)))
                names = [name for name in _OF_MODELS if name in state]
                groups.setdefault((type(module), tables, ()), []).append(place)
            else:
                names = [name for name, value in state.items() if _counts(name, value, module)]
                groups.setdefault((type(module), tables, tuple(names)), []).append(place)
            modules += self._reach([type(module), *(state[name] for name in names)])
        configs = [vars(module).get("config") for module in modules]
        chosen = {getattr(config, "_attn_implementation", None): None for config in configs}
        self._sources.append(functools.partial(attention_functions, chosen))
        self._reach(attention_functions(chosen))
        files = dict.fromkeys(base.__module__ for base in self._classes if is_library(base.__module__))
        namespaces = [vars(sys.modules[name]) for name in files if name.startswith("transformers.models.")]
        self._files = [self._functions_of(namespace) for namespace in (*namespaces, vars(nn.functional))]
        del self._seen
        self.modules = [weakref.ref(module) for module in modules]
        self._groups = [
            _Group(
                [self.modules[place] for place in places],
                None
                if issubclass(kind, GenerationMixin)
                else [len(vars(modules[place])) for place in places],
                _getter((*tables, *names, _flag_of(modules[places[0]]), *HOOKS)),
                len(tables),
                len(tables) + len(names),
            )
            for (kind, tables, names), places in groups.items()
        ]
        values = self._shallow() or []
        self._deep = [place for place, value in enumerate(values) if isinstance(value, _CONTAINERS)]

    def now(self) -> tuple[list[Any], list[Any]] | None:
        """All of it as it is now, and what containers hold; None where a module, an attribute or a function
        of a file is gone.
        """
        values = self._shallow()
        if values is None:
            return None
        containers = []
        for place in self._deep:
            if place < len(values):
                containers.append(values[place])
                values[place] = None
        for kind in self._classes:
            values += vars(kind).values()
        try:
            for namespace, names in self._files:
                values += names(namespace)
        except KeyError:
            return None
        return values, _contents_of(containers)

    def _shallow(self) -> list[Any] | None:
        """The values, with containers as they are."""
        values: list[Any] = []
        self.training = training = []
        self.hooks = []
        hooks = self.hooks
        for members, sizes, read, num_tables, width in self._groups:
            modules = [reference() for reference in members]
            try:
                states = list(map(STATE, modules))
                flat = list(itertools.chain.from_iterable(map(read, states)))
            except (AttributeError, KeyError):  # the first of None, where a module is gone
                return None
            if sizes is not None and list(map(len, states)) != sizes:
                return None
            values += set(map(type, modules))
            stride = width + 1 + len(HOOKS)
            training += flat[width::stride]
            # Looked into, since who puts hooks away and back again writes the tables.
            for number in range(width + 1, stride):
                hooks += itertools.chain.from_iterable(filter(None, flat[number::stride]))
            for number in range(num_tables):
                values += itertools.chain.from_iterable(map(dict.values, flat[number::stride]))
            for number in range(num_tables, width):
                values += flat[number::stride]
        for source in self._sources:
            values += source()
        return values

    # ------------------------------------------------------------------------------------------ walking once
    def _reach(self, values: Iterable[Any]) -> list[nn.Module]:
        """Adds what the values hold, and returns the modules below them that were not known."""
        modules: list[nn.Module] = []
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            if isinstance(value, SIMPLE) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            if isinstance(value, nn.Module):
                below = [
                    module for module in value.modules() if module is value or id(module) not in self._seen
                ]
                self._seen.update((id(module), module) for module in below)
                modules += below
            elif isinstance(value, _CONTAINERS):
                waiting += _parts(value)
            elif isinstance(value, types.FunctionType):
                waiting += self._of_function(value)
            elif isinstance(value, type):
                waiting += self._of_class(value)
            else:
                waiting += self._of_object(value)
        return modules

    def _of_function(self, function: types.FunctionType) -> list[Any]:
        wrapped = [function.__wrapped__] if hasattr(function, "__wrapped__") else []
        if is_library(str(function.__globals__.get("__name__"))):
            return wrapped
        self.foreign = self.foreign or f"{function.__module__}.{function.__qualname__}"
        names = [name for name in _names_in(function.__code__) if name in function.__globals__]
        source = functools.partial(_read_function, weakref.ref(function), names)
        self._sources.append(source)
        return [*wrapped, *source()]

    def _of_class(self, kind: type) -> list[Any]:
        modules = issubclass(kind, nn.Module)
        if is_library(kind.__module__):
            if not modules:
                return []
            self._classes[kind] = None
            found = [value for value in vars(kind).values() if isinstance(value, types.FunctionType)]
        else:
            self.foreign = self.foreign or f"{kind.__module__}.{kind.__qualname__}"
            self._sources.append(functools.partial(_read_class, weakref.ref(kind)))
            found = list(vars(kind).values())
        return [*found, *(kind.__mro__[1:-1] if modules else ())]

    def _of_object(self, value: Any) -> list[Any]:
        file = value.__name__ if isinstance(value, types.ModuleType) else type(value).__module__
        if is_library(file) and not isinstance(value, PreTrainedConfig):
            return []
        can_be_followed = hasattr(value, "__dict__") and type(value).__weakrefoffset__
        if isinstance(value, types.ModuleType) or not can_be_followed:
            self.unseen.append(f"a {type(value).__name__}")
            return []
        source = functools.partial(_read_object, weakref.ref(value))
        self._sources.append(source)
        return list(source())

    def _functions_of(self, namespace: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        """The namespace of a file, and what gets its functions and what stands in place of one."""
        functions = {
            name: value
            for name, value in namespace.items()
            if callable(value) and not isinstance(value, type) and not is_compilers(name)
        }
        self._reach(functions.values())
        return namespace, _getter(tuple(functions))


# ----------------------------------------------------------------------------------------------- as it is now
def _of_model(reference: weakref.ref[Any]) -> list[Any]:
    """Names and values of what counts of a model that generates."""
    module: Any = reference()
    return [
        part
        for name, value in vars(module).items()
        if name in _OF_MODELS
        or (type(value) not in _TABLE_TYPES and isinstance(value, ATOMS) and _counts(name, value, module))
        for part in (name, value)
    ]


def attention_functions(names: Iterable[str | None]) -> list[Any]:
    """What answers the names of attention implementations."""
    tables = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    return [table.get(name) for name in dict.fromkeys(names) if name is not None for table in tables]


def _read_function(reference: weakref.ref[Any], names: list[str]) -> list[Any]:
    function = reference()
    if function is None:
        return []
    cells = [content for cell in function.__closure__ or () for content in _content(cell)]
    named = map(function.__globals__.get, names)
    return [function.__code__, function.__defaults__, function.__kwdefaults__, *cells, *named]


def _read_class(reference: weakref.ref[Any]) -> list[Any]:
    kind = reference()
    # Descriptors of `__dict__` and the like are never exchanged, and would keep the class alive.
    return [value for value in vars(kind or object).values() if type(value) not in _DESCRIPTORS]


def _read_object(reference: weakref.ref[Any]) -> list[Any]:
    value = reference()
    if isinstance(value, PreTrainedConfig):
        items = [item for item in vars(value).items() if item[0] not in OF_CALLS]
    else:
        items = list(vars(value).items()) if value is not None else []
    return [type(value), *itertools.chain.from_iterable(items)]


def _parts(container: Any) -> list[Any]:
    """What a container, a method or a partial function holds."""
    if isinstance(container, dict):
        return [*container.keys(), *container.values()]
    if isinstance(container, types.MethodType):
        return [container.__self__, container.__func__]
    if isinstance(container, functools.partial):
        return [container.func, container.args, container.keywords]
    if isinstance(container, property):
        return [container.fget, container.fset, container.fdel]
    if isinstance(container, staticmethod | classmethod):
        return [container.__func__]
    return list(container)


def _contents_of(containers: list[Any]) -> list[Any]:
    """What containers hold: in one text where that is numbers and names."""
    try:
        return [marshal.dumps(containers, 2)]
    except ValueError:
        return _flattened(containers)


def _flattened(values: list[Any]) -> list[Any]:
    """What containers hold, in a row that tells their kinds and where each ends."""
    flat: list[Any] = []
    waiting, seen = values, set()
    while waiting:
        value = waiting.pop()
        if type(value) in _EXACT or not isinstance(value, _CONTAINERS):
            flat.append(value)
            continue
        flat.append(type(value))
        if id(value) not in seen:
            seen.add(id(value))
            waiting.append(_END)
            waiting += _parts(value)
    return flat


def _getter(names: Sequence[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """Gets the values behind some keys, as a tuple of at least two."""
    first, *others = names
    return operator.itemgetter(first, *(others or (first,)))


def _content(cell: Any) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not yet filled
        return ()


def _names_in(code: types.CodeType) -> Iterator[str]:
    """The global names that a function and those inside of it mention."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
