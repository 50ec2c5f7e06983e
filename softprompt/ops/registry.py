"""The ops of the package: one `torch.library` namespace, their back ends, and the choice among them.

An op is a Python function with annotated parameters, from which its schema follows. A parameter may be a
NamedTuple or a dataclass: it stands in the schema as its fields, and the function is given it whole. The
schemas are made in Python, so that `torch.ops.softprompt.*`, `torch.library.opcheck` and
`torch.compile(fullgraph=True)` work on every machine, whatever back ends it has.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

AUTO = "auto"
BACKENDS = ("reference", "triton", "native")
# What "auto" takes, the first that is there. On a CPU by measurement (docs/benchmarks.md); on a GPU the
# compiled kernels were not measured yet, and Triton comes with every CUDA build of torch.
PREFERRED = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}
BUILD_COMMAND = "pip install --no-build-isolation ."
_NATIVE_MODULES = {"cpu": "softprompt._native_cpu", "cuda": "softprompt._native_cuda"}
_NATIVE_INTERFACE = 4  # SOFTPROMPT_INTERFACE in csrc/tensors.h
# Numbers of csrc/cpu/lanes.h: of the compiled ops that are there for several sets of instructions.
INSTRUCTIONS = {"best": 0, "baseline": 1, "avx2": 2, "avx512": 3}
_LIBRARY = torch.library.Library("softprompt", "DEF")
_PLAIN = (Tensor, Parameter)
_NONE = inspect.Parameter.empty
KERNELS: dict[Any, Callable[..., Any]] = {}  # what runs an op, by `torch.ops.softprompt.<name>.default`


@dataclass(frozen=True)
class Availability:
    """Whether a back end can serve tensors of a device, and a sentence that says why (not)."""

    usable: bool
    reason: str


@functools.cache
def fields_of(group: type) -> tuple[str, ...]:
    """The fields of a NamedTuple or dataclass that are given when it is made."""
    if dataclasses.is_dataclass(group):
        return tuple(field.name for field in dataclasses.fields(group) if field.init)
    return getattr(group, "_fields", ())


class _Signature:
    """The parameters of a function, as they are and as they stand in a schema."""

    def __init__(self, function: Callable[..., Any]) -> None:
        hints = typing.get_type_hints(function)
        defaults = {name: one.default for name, one in inspect.signature(function).parameters.items()}
        self.returns = hints.pop("return")
        self.names = tuple(hints)
        self.flat: dict[str, tuple[Any, Any]] = {}  # type and default of each
        self.parts: list[tuple[Callable[..., Any] | None, int, int]] = []
        for name, hint in hints.items():
            fields, first = fields_of(hint), len(self.flat)
            if fields:
                own, given = typing.get_type_hints(hint), _defaults_of(hint)
            else:
                own, given = hints, defaults
            self.flat |= {one: (own[one], given.get(one, _NONE)) for one in fields or (name,)}
            self.parts.append((_maker(hint) if fields else None, first, len(self.flat)))
        self.is_flat = len(self.flat) == len(self.names)

    def whole(self, flat: Sequence[Any]) -> list[Any]:
        """The arguments of the function, from those of the op."""
        return [flat[i] if make is None else make(*flat[i:end]) for make, i, end in self.parts]

    def schema(self) -> str:
        """Of the op; a default counts where all behind it have one."""
        parameters: list[inspect.Parameter] = []
        all_have = True
        for name, (hint, default) in reversed(self.flat.items()):
            all_have &= default is not _NONE
            hint = Sequence[int] if typing.get_origin(hint) in (tuple, list) else hint
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            default = default if all_have else _NONE
            parameters.insert(0, inspect.Parameter(name, kind, annotation=hint, default=default))
        count = len(fields_of(self.returns))
        returns = types.GenericAlias(tuple, (Tensor,) * count) if count else self.returns

        def prototype() -> None: ...

        signature = inspect.Signature(parameters, return_annotation=returns)
        prototype.__signature__ = signature  # type: ignore[attr-defined]
        return torch.library.infer_schema(prototype, mutates_args=())


def _defaults_of(group: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(group):
        return dict(group._field_defaults)
    fields = dataclasses.fields(group)
    return {one.name: one.default for one in fields if one.default is not dataclasses.MISSING}


def _maker(group: type) -> Callable[..., Any]:
    if not dataclasses.is_dataclass(group):
        return group
    return lambda *fields: group(*(tuple(one) if isinstance(one, list) else one for one in fields))


def define(
    name: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any] | None = None,
    backward: Callable[..., dict[str, Tensor | None]] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Any:
    """Makes `softprompt::<name>` of a function, and returns `torch.ops.softprompt.<name>.default`.

    With `fake` the op is opaque to autograd and to the compiler: `kernel` serves every device, `fake` gives
    the shapes. `setup_context(ctx, inputs, output)` and `backward(ctx, *grads)` are those of
    `torch.library.register_autograd`, but that the inputs are the function's own, and the gradients a
    dictionary by the names of the inputs that get one. Without `fake` the kernel is a composition of
    differentiable PyTorch ops and is traced through.
    """
    signature = _Signature(kernel)
    _LIBRARY.define(name + signature.schema(), tags=(torch.Tag.pt2_compliant_tag,))
    run = _given_whole(signature, kernel)
    if fake is None:
        _LIBRARY.impl(name, run, "CompositeImplicitAutograd")
    else:
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"softprompt::{name}", _given_whole(signature, fake), lib=_LIBRARY)
        if backward is not None:
            torch.library.register_autograd(
                f"softprompt::{name}",
                _gradients_in_order(backward, tuple(signature.flat)),
                setup_context=setup_context and _setup_given_whole(signature, setup_context),
                lib=_LIBRARY,
            )
    overload = getattr(torch.ops.softprompt, name).default
    KERNELS[overload] = run
    return overload


def _given_whole(signature: _Signature, function: Callable[..., Any]) -> Callable[..., Any]:
    if signature.is_flat:
        return function
    return lambda *flat: function(*signature.whole(flat))


def _setup_given_whole(signature: _Signature, setup_context: Callable[..., None]) -> Callable[..., None]:
    return lambda ctx, inputs, output: setup_context(ctx, signature.whole(inputs), output)


def _gradients_in_order(
    backward: Callable[..., dict[str, Tensor | None]], names: tuple[str, ...]
) -> Callable[..., tuple[Tensor | None, ...]]:
    def ordered(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = backward(ctx, *grads)
        return tuple(map(found.get, names))

    return ordered


def eager(op: Any, kernel: Callable[..., Any], **autograd: Callable[..., Any]) -> Callable[..., Any]:
    """The op that `define` made of the same functions, called with the function's own arguments.

    A call of plain tensors goes by `torch.autograd.Function`, which costs a third of what `torch.library`
    does; the op itself serves tracing, and batches of gradients (`is_grads_batched=True`). The first argument
    is the tensor that is looked at.

    Args:
        op: what `define` returned.
        kernel: as given to `define`.
        autograd: `backward` and `setup_context` as given to `define`; without them, a call under autograd
            goes to the op.
    """
    signature = _Signature(kernel)
    function: Any = None
    if "setup_context" in autograd:
        setup = autograd["setup_context"]

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = kernel(*arguments)
            setup(ctx, arguments, output)
            return output

        function = type(
            "Eager",
            (torch.autograd.Function,),
            {
                "forward": staticmethod(forward),
                "backward": staticmethod(_gradients_in_order(autograd["backward"], signature.names)),
            },
        )

    def call(*arguments: Any) -> Any:
        first = arguments[0]
        if type(first) in _PLAIN and not torch._C._functorch.is_legacy_batchedtensor(first):
            if function is not None:
                return function.apply(*arguments)
            if not torch.is_grad_enabled():
                return kernel(*arguments)
        return op(*flattened(arguments))

    return call


def differentiable_once(op: str) -> Callable[..., dict[str, Tensor | None]]:
    """The `backward` of the op that computes the gradient of `op`. Without it, autograd would take gradients
    for constants: a wrong second derivative and a warning.
    """

    def refuse(ctx: Any, *grads: Tensor | None) -> dict[str, Tensor | None]:
        raise RuntimeError(f"{op} can be differentiated once, got a second derivative")

    return refuse


def flattened(arguments: Iterable[Any]) -> list[Any]:
    """Arguments of a function as its op takes them: the fields of a NamedTuple or dataclass one by one."""
    flat: list[Any] = []
    for argument in arguments:
        names = fields_of(argument.__class__)
        flat += [getattr(argument, name) for name in names] if names else [argument]
    return flat


def declare(schema: str) -> Any:
    """Declares `softprompt::<schema>` and returns the callable op; a compiled module implements it."""
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.softprompt, schema.split("(", 1)[0]).default


@dataclass(frozen=True)
class Backends:
    """The functions that serve an op, by back end, all with the same parameters."""

    op: str  # the name that errors give
    reference: Callable[..., Any]
    native: Callable[..., Any] | None = None
    triton: str | None = None  # "module:function", for triton is imported at the first call
    native_devices: tuple[str, ...] = ("cpu", "cuda")  # those of whose tensors the compiled op takes

    def chosen(self, backend: str, device: torch.device) -> str:
        """The back end of this call, the reference where the one asked for has nothing of its own."""
        name = choose_backend(self.op, backend, device)
        if getattr(self, name) is None or (name == "native" and device.type not in self.native_devices):
            return "reference"
        return name

    def function(self, name: str) -> Callable[..., Any]:
        """What serves the op with this back end."""
        found: Callable[..., Any] = _loaded(self.triton) if name == "triton" else getattr(self, name)
        return found


@functools.cache
def _loaded(where: str) -> Any:
    module, name = where.split(":")
    return getattr(importlib.import_module(module), name)


def define_filled(
    name: str,
    backends: Backends,
    allocate: Callable[..., Any],
    *,
    check: Callable[..., None] | None = None,
    **autograd: Callable[..., Any],
) -> Any:
    """An op whose back ends write tensors that are made before: see `define`.

    Args:
        name: of the op.
        backends: of these the reference returns the results; Triton and the compiled op are given the results
            to write behind the arguments.
        allocate: makes the results. The schema follows from its parameters, with `backend` behind them; the
            first one begins with a tensor of the device that serves the call.
        check: raises where values do not fit.
        autograd: `backward` and `setup_context` of `define`.
    """

    def run(*arguments: Any) -> Any:
        *inputs, backend = arguments
        if check is not None:
            check(*inputs)
        first = inputs[0] if isinstance(inputs[0], Tensor) else inputs[0][0]
        chosen = backends.chosen(backend, first.device)
        if chosen == "reference":
            return backends.reference(*inputs)
        results = allocate(*inputs)
        backends.function(chosen)(*inputs, *([results] if isinstance(results, Tensor) else results))
        return results

    def fake(*arguments: Any) -> Any:
        return allocate(*arguments[:-1])

    hints = typing.get_type_hints(allocate)
    returns = hints.pop("return")
    run.__annotations__ = {**hints, "backend": str, "return": returns}
    return define(name, run, fake=fake, **autograd)


@functools.cache
def triton_availability(device_type: str) -> Availability:
    """Whether the Triton kernels can serve tensors of `device_type` ("cpu", "cuda")."""
    if importlib.util.find_spec("triton") is None:
        return Availability(False, "triton is not installed (pip install triton)")
    if device_type == "cuda":
        return Availability(True, "triton is installed and the tensors are on a GPU")
    import triton

    if device_type == "cpu" and triton.knobs.runtime.interpret:
        return Availability(True, "TRITON_INTERPRET=1: the interpreter runs the kernels on CPU tensors")
    return Availability(
        False, f"Triton needs CUDA tensors, or TRITON_INTERPRET=1 for the CPU; got {device_type}"
    )


@functools.cache
def native_availability(device_type: str) -> Availability:
    """Whether the compiled ops can serve tensors of `device_type` ("cpu", "cuda")."""
    if device_type not in _NATIVE_MODULES:
        return Availability(False, f"there are no native ops for {device_type} tensors")
    name = _NATIVE_MODULES[device_type]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return Availability(False, f"the native ops for {device_type} are not built ({BUILD_COMMAND})")
    except ImportError as error:
        return Availability(False, f"{name} does not load: {error} (build it again: {BUILD_COMMAND})")
    built_as = getattr(module, "INTERFACE", None)
    if built_as != _NATIVE_INTERFACE:
        return Availability(
            False,
            f"{name} was built from other sources (interface {built_as}, expected {_NATIVE_INTERFACE}; "
            f"build it again: {BUILD_COMMAND})",
        )
    return Availability(True, f"{name} is built")


def availability(backend: str, device_type: str) -> Availability:
    """Whether "reference", "triton" or "native" can serve tensors of `device_type`."""
    if backend == "triton":
        return triton_availability(device_type)
    if backend == "native":
        return native_availability(device_type)
    return Availability(True, "PyTorch, on every device")


def choose_backend(op: str, backend: str, device: torch.device) -> str:
    """The back end that serves this call.

    Args:
        op: name of the op, for the error message.
        backend: "auto" or the name of one back end.
        device: device of the tensors.

    Raises:
        ValueError: an unknown back end, or one that cannot serve `device`.
    """
    if backend == AUTO:
        for name in PREFERRED.get(device.type, ()):
            if availability(name, device.type).usable:
                return name
        return "reference"
    if backend not in BACKENDS:
        known = ", ".join(sorted((AUTO, *BACKENDS)))
        raise ValueError(f"{op}: unknown backend {backend!r}, expected one of {known}")
    found = availability(backend, device.type)
    if not found.usable:
        raise ValueError(f"{op}: backend={backend!r} cannot be used: {found.reason}")
    return backend
