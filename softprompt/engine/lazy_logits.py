"""Logits that are computed when something first looks at them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._pytree import tree_map

# What a tensor can say of itself without its values. Everything else materialises.
_KNOWN = (
    {
        getattr(torch.Tensor, name).__get__
        for name in (
            "shape",
            "dtype",
            "device",
            "ndim",
            "layout",
            "is_cuda",
            "is_sparse",
            "is_quantized",
            "is_meta",
        )
    }
    | {
        # Not through `torch.Tensor`, whose properties of Python shadow these.
        vars(torch._C.TensorBase)[name].__get__
        for name in ("requires_grad", "grad_fn", "is_leaf", "_base")
    }
    | {
        getattr(torch.Tensor, name)
        for name in (
            "size",
            "dim",
            "ndimension",
            "numel",
            "nelement",
            "element_size",
            "is_floating_point",
            "__len__",
        )
    }
)
_CASTS: dict[Any, torch.dtype] = {
    torch.Tensor.float: torch.float32,
    torch.Tensor.double: torch.float64,
    torch.Tensor.half: torch.float16,
    torch.Tensor.bfloat16: torch.bfloat16,
}


_CLONES = (torch.Tensor.clone, torch.clone)


class LazyLogits(torch.Tensor):
    """A tensor whose shape, dtype and device are known and whose values are made by `make` on first use.

    Asking for shape, dtype, device and the like, casting it, detaching it, cloning it and hooks on its
    gradient keep it lazy; any other use computes the values once, with their gradient, and goes on with the
    ordinary tensor.
    """

    _make: Callable[[], Tensor]
    _value: Tensor | None
    _home: Callable[[], Any]  # the checkpointed function that it was made in
    _by_wrapper: bool  # the gradient of the values takes the way of the wrapper, on which something waits

    @staticmethod
    def __new__(
        cls,
        make: Callable[[], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> LazyLogits:
        """Wraps `make`, which has to return a tensor of this shape, dtype and device."""
        lazy: LazyLogits = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        lazy._make = make
        lazy._value = None
        frame = _checkpoint()
        lazy._home = _nowhere if frame is None else weakref.ref(frame)
        lazy._by_wrapper = False
        return lazy

    @property
    def is_materialized(self) -> bool:
        """Whether the values exist."""
        return self._value is not None

    def materialize(self) -> Tensor:
        """The ordinary tensor.

        A checkpointed function that only uses it finds it there when it runs again: what its making keeps for
        the gradient is none of the function's.
        """
        if self._value is None:
            with _kept() if self._is_abroad() else contextlib.nullcontext():
                value = self._make()
            if self._by_wrapper and self.requires_grad:
                with torch.enable_grad():
                    value = _ByWrapper.apply(self, value.detach())
            self._value = value
        return self._value

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, LazyLogits) and first._value is None:
            if func in _KNOWN:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if first._is_abroad():  # when the function runs again there are values
                first.materialize()
                return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
            if func in _CASTS and len(args) == 1 and not kwargs:
                return first._derive(_CASTS[func], detach=False)
            if func is torch.Tensor.detach or func is torch.detach:
                return first._derive(None, detach=True)
            if func in _CLONES and len(args) == 1 and not kwargs:
                return first._clone()
            if func is torch.Tensor.register_hook and first.requires_grad:
                first._by_wrapper = True
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """For code below Python's tensor functions, which would find no storage."""
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))

    def _is_abroad(self) -> bool:
        """Whether it is used in a checkpointed function that it was not made in."""
        frame = _checkpoint()
        return frame is not None and frame is not self._home()

    def _derive(self, dtype: torch.dtype | None, *, detach: bool) -> LazyLogits:
        target = self.dtype if dtype is None else dtype

        def make() -> Tensor:
            value = self.materialize()
            return (value.detach() if detach else value).to(target)

        if detach:
            return LazyLogits(make, tuple(self.shape), target, self.device)
        return with_gradient(self, lambda lazy: lazy.to(target), make, tuple(self.shape), target)

    def _clone(self) -> LazyLogits:
        shape = tuple(self.shape)
        if torch.is_grad_enabled():
            return with_gradient(
                self, lambda lazy: lazy.clone(), lambda: self.materialize().clone(), shape, self.dtype
            )
        clone = LazyLogits(lambda: self.materialize().detach().clone(), shape, self.dtype, self.device)
        # DDP clones its outputs inside of a node of its own, which the clone then belongs to.
        clone._by_wrapper = True
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or a file holds the values."""
        return self.materialize().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A copy holds the values."""
        copied: Tensor = self.materialize().__deepcopy__(memo)
        return copied

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shows the values."""
        return repr(self.materialize())


class _Lazily(torch.autograd.Function):
    """The node behind lazy logits, for code below Python's tensor functions that takes the wrapper itself."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        values_of: Callable[[Tensor], Tensor],
        make: Callable[[], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(source)
        ctx.values_of = values_of
        return LazyLogits(make, shape, dtype, source.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return None, None, None, None, None
        (source,) = ctx.saved_tensors
        with torch.enable_grad():
            inner = _plain(source).detach().requires_grad_()
            (grad,) = torch.autograd.grad(ctx.values_of(inner), inner, _plain(grads[0]))
        return grad, None, None, None, None


class _ByWrapper(torch.autograd.Function):
    """Values whose gradient is that of the wrapper which they come from."""

    @staticmethod
    def forward(ctx: Any, lazy: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


def with_gradient(
    source: Tensor,
    values_of: Callable[[Tensor], Tensor],
    make: Callable[[], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> LazyLogits:
    """Lazy logits whose gradient goes to `source`.

    Args:
        source: what the values are computed from.
        values_of: computes them, differentiably, from a tensor like `source`.
        make: the same from `source` itself.
        shape: of the values.
        dtype: of the values.
    """
    if not (torch.is_grad_enabled() and source.requires_grad):
        return LazyLogits(make, shape, dtype, source.device)
    lazy: LazyLogits = _Lazily.apply(source, values_of, make, shape, dtype)
    return lazy


def _nowhere() -> None:
    return None


def _checkpoint() -> Any:
    """What stands for the checkpointed function that runs now (`torch.utils.checkpoint` without reentrance).

    None outside of one. It is the function which takes what is saved for the backward, another one for each
    run.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or hooks[0].__module__ != torch.utils.checkpoint.__name__:
        return None
    return hooks[0]


def _kept() -> Any:
    """In the block nothing that is saved for the backward is taken by a checkpoint."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _plain(item: Any) -> Any:
    return item.materialize() if isinstance(item, LazyLogits) else item


@contextlib.contextmanager
def _modes(device_type: str, autocast: bool, dtype: torch.dtype, grad: bool) -> Iterator[None]:
    with torch.autocast(device_type, dtype=dtype, enabled=autocast), torch.set_grad_enabled(grad):
        yield


def in_this_mode(values_of: Callable[[Tensor], Tensor], device_type: str) -> Callable[[Tensor], Tensor]:
    """`values_of`, to be called later under the autocast and gradient modes of now."""
    modes = (
        device_type,
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
        torch.is_grad_enabled(),
    )

    def later(source: Tensor) -> Tensor:
        with _modes(*modes):
            return values_of(source)

    return later


def logits_of(
    hidden: Tensor,
    values_of: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    added: torch.dtype | None = None,
    casts: bool = True,
) -> LazyLogits:
    """Lazy logits, with the gradient of `hidden` and the autocast of now.

    Args:
        hidden: what they are made of.
        values_of: makes them.
        shape: of the logits.
        dtype: of the logits without autocast.
        added: dtype of what the model adds to the product with its head, which autocast leaves alone.
        casts: whether the logits follow autocast.
    """
    device_type = hidden.device.type
    casts = casts and dtype in (torch.float32, torch.float16, torch.bfloat16)
    if casts and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        dtype = dtype if added is None else torch.promote_types(dtype, added)
    in_mode = in_this_mode(values_of, device_type)
    return with_gradient(hidden, in_mode, lambda: in_mode(hidden), shape, dtype)
