"""The op of the back ends that bring kernels of their own, the compiled one and Triton, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt.ops.registry import Backends, define, differentiable_once, eager
from softprompt.ops.shared_prompt_attention import native
from softprompt.ops.shared_prompt_attention.layout import (
    Attended,
    AttentionLayout,
    AttentionOptions,
    rows_first,
)

_TRITON = "softprompt.ops.shared_prompt_attention.triton:"


def _forward(
    query: Tensor,  # [Hq, T, D]
    key: Tensor,  # [Hkv, T, D]
    value: Tensor,  # [Hkv, T, Dv]
    sinks: Tensor | None,  # [Hq]
    layout: AttentionLayout,
    options: AttentionOptions,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output, and what the backward needs to make the probabilities again."""
    found: tuple[Tensor, Tensor] = _FORWARDS.function(backend)(query, key, value, sinks, layout, options)
    return found


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    layout: AttentionLayout,
    options: AttentionOptions,
    backend: str,
) -> tuple[Tensor, Tensor]:
    heads, rows, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return rows_first(value, heads), query.new_empty(heads, rows, dtype=wide)


def _setup_context(ctx: Any, inputs: list[Any], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.layout, ctx.options, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> dict[str, Tensor | None]:
    if grad_out is None:
        return {}
    saved = Attended(*ctx.saved_tensors)
    grads = _gradients(grad_out, saved, ctx.layout, ctx.options, ctx.backend)
    names = ("query", "key", "value") if saved.sinks is None else ("query", "key", "value", "sinks")
    return dict(zip(names, grads, strict=False))


def _gradient(
    grad_out: Tensor,  # [Hq, T, Dv]
    saved: Attended,
    layout: AttentionLayout,
    options: AttentionOptions,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d(query), d(key), d(value), and d(sinks), which is empty where there are none."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _BACKWARDS.function(backend)(
        grad_out, saved, layout, options
    )
    return found


def _gradient_fake(
    grad_out: Tensor, saved: Attended, layout: AttentionLayout, options: AttentionOptions, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = saved.lse.new_empty(0) if saved.sinks is None else torch.empty_like(saved.sinks)
    return rows_first(saved.query), rows_first(saved.key), rows_first(saved.value), sinks


_FORWARDS = Backends("shared_prompt_attention", native.forward, native.forward, _TRITON + "forward")
_BACKWARDS = Backends("shared_prompt_attention", native.backward, native.backward, _TRITON + "backward")
_AUTOGRAD: dict[str, Any] = {"backward": _backward, "setup_context": _setup_context}
attend = eager(
    define("shared_prompt_attention_kernel", _forward, fake=_forward_fake, **_AUTOGRAD), _forward, **_AUTOGRAD
)
_gradients = eager(
    define(
        "shared_prompt_attention_kernel_backward",
        _gradient,
        fake=_gradient_fake,
        backward=differentiable_once("shared_prompt_attention"),
    ),
    _gradient,
)
