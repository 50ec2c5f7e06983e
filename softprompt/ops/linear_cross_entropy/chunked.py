"""The matrix products around a back end's row function, a chunk of label rows at a time, and the schemas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from softprompt.ops.constants import ROW_ALIGNMENT
from softprompt.ops.linear_cross_entropy import native, reference
from softprompt.ops.linear_cross_entropy.arguments import Head, LossOptions
from softprompt.ops.linear_cross_entropy.products import d_rows_of, logits_of
from softprompt.ops.registry import Backends, choose_backend, define

# A chunk reads the whole weight, so below about 200 rows on a GPU its time does not depend on the rows.
_GPU_CHUNK_BYTES, _GPU_CHUNK_ROWS = 128 << 20, 1024
_CPU_CHUNK_BYTES, _CPU_CHUNK_ROWS = 128 << 20, 1
_ACCUMULATOR_BYTES = 64 << 20


def losses_of_rows(head: Head, options: LossOptions, backend: str) -> Tensor:
    """The [M] losses, differentiable once in `hidden`, `weight` and `bias`."""
    gradient = torch.is_grad_enabled() and head.hidden.requires_grad
    losses: Tensor = _LOSSES(*head, *options, gradient, backend)[0]
    return losses


def chunk_bounds(num_rows: int, row_bytes: int, device_type: str) -> Iterator[slice]:
    """Slices of nearly equal length, each of at least `budget` bytes and rows and less than twice that."""
    if device_type == "cpu":
        budget, fewest = _CPU_CHUNK_BYTES, _CPU_CHUNK_ROWS
    else:
        budget, fewest = _GPU_CHUNK_BYTES, _GPU_CHUNK_ROWS
    chunks = max(1, num_rows // max(fewest, budget // row_bytes))
    for chunk in range(chunks if num_rows else 0):
        yield slice(num_rows * chunk // chunks, num_rows * (chunk + 1) // chunks)


class _Logits:
    """One call's logits: gathered rows, their targets, and a buffer that every chunk reuses."""

    def __init__(self, head: Head, options: LossOptions, backend: str) -> None:
        hidden, self.weight, self.bias, label_rows, targets = head
        self.options = options
        self.backend = choose_backend("linear_cross_entropy", backend, hidden.device)
        self.loss_dtype = loss_dtype(self.weight)
        self.scored: Tensor | None = None
        on_cpu = hidden.device.type == "cpu"
        if on_cpu:
            _check_range("targets", targets, self.weight.shape[0], ignored=options.ignore_index)
            if label_rows is not None:
                _check_range("label_rows", label_rows, hidden.shape[0])
        if label_rows is None or on_cpu:
            self.scored = (targets != options.ignore_index).nonzero().squeeze(1)
            targets = targets[self.scored]
            label_rows = self.scored if label_rows is None else label_rows[self.scored]
        self.targets = targets
        self.rows = hidden.index_select(0, label_rows).to(self.weight.dtype)

    def chunks(
        self,
        losses: Tensor,  # [rows]
        grad_losses: Tensor | None,  # [rows]
        *,
        gradient: bool,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Fills `losses` and yields each chunk's rows with its d(logits), valid until the next chunk."""
        num_rows, vocab_size = self.rows.shape[0], self.weight.shape[0]
        row_function = _ROWS.function(self.backend)
        row_length = -(-vocab_size // ROW_ALIGNMENT) * ROW_ALIGNMENT
        row_bytes = row_length * self.weight.element_size()
        bounds = list(chunk_bounds(num_rows, row_bytes, self.rows.device.type))
        most = max((chunk.stop - chunk.start for chunk in bounds), default=0)
        buffer = self.weight.new_empty(most, row_length)
        # Such a product multiplies the padding with zeros, which is right for anything but NaN. The row
        # functions leave it zero.
        buffer[:, vocab_size:] = 0
        for chunk in bounds:
            logits = buffer[: chunk.stop - chunk.start, :vocab_size]
            logits_of(self.rows[chunk], self.weight, logits, self.backend)
            row_function(
                logits,
                self.bias,
                self.targets[chunk],
                losses[chunk],
                None if grad_losses is None else grad_losses[chunk],
                self.options,
                gradient=gradient,
            )
            yield chunk, logits

    def spread(self, values: Tensor, num_rows: int) -> Tensor:
        """Values of the scored rows at their places among all M rows, zeros elsewhere."""
        if self.scored is None or values.shape[0] == num_rows:
            return values
        return values.new_zeros(num_rows, *values.shape[1:]).index_copy_(0, self.scored, values)


def loss_dtype(weight: Tensor) -> torch.dtype:
    """fp32, or fp64 for an fp64 head."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _check_range(name: str, indices: Tensor, size: int, ignored: int | None = None) -> None:
    outside = (indices < 0) | (indices >= size)
    expected = f"0 .. {size - 1}"
    if ignored is not None:
        outside &= indices != ignored
        expected += f" or {ignored} (ignored)"
    if outside.any():
        place = int(outside.nonzero()[0])
        raise IndexError(f"{name}[{place}] is {int(indices[place])}, expected {expected}")


def _losses(head: Head, options: LossOptions, gradient: bool, backend: str) -> tuple[Tensor, Tensor]:
    logits = _Logits(head, options, backend)
    num_scored = logits.rows.shape[0]
    losses = head.weight.new_empty(num_scored, dtype=logits.loss_dtype)
    d_rows = head.weight.new_empty(num_scored if gradient else 0, head.hidden.shape[1])
    for chunk, d_logits in logits.chunks(losses, None, gradient=gradient):
        if gradient:
            d_rows_of(d_logits, head.weight, d_rows[chunk], logits.backend)
    num_rows = head.targets.shape[0]
    return logits.spread(losses, num_rows), logits.spread(d_rows, num_rows) if gradient else d_rows


def _losses_fake(head: Head, options: LossOptions, gradient: bool, backend: str) -> tuple[Tensor, Tensor]:
    num_rows, weight = head.targets.shape[0], head.weight
    losses = weight.new_empty(num_rows, dtype=loss_dtype(weight))
    return losses, weight.new_empty(num_rows if gradient else 0, head.hidden.shape[1])


def _d_hidden(
    d_rows: Tensor,  # [M, H]
    grad_losses: Tensor,  # [M]
    label_rows: Tensor | None,  # [M]
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    factor = grad_losses[:, None]
    if label_rows is None:
        return (d_rows * factor).to(dtype)
    width = d_rows.shape[1]
    d_hidden = d_rows.new_zeros(num_rows, width, dtype=dtype)
    if dtype == grad_losses.dtype:
        return d_hidden.index_add_(0, label_rows, d_rows * factor)
    # A block of columns at a time: the fp32 sums of a long row would be larger than the hidden states.
    block = max(1, _ACCUMULATOR_BYTES // max(1, num_rows * grad_losses.element_size()))
    for start in range(0, width, block):
        columns = slice(start, start + block)
        share = d_rows[:, columns] * factor
        d_hidden[:, columns] = share.new_zeros(num_rows, share.shape[1]).index_add_(0, label_rows, share)
    return d_hidden


def _d_hidden_fake(
    d_rows: Tensor, grad_losses: Tensor, label_rows: Tensor | None, num_rows: int, dtype: torch.dtype
) -> Tensor:
    return d_rows.new_empty(num_rows, d_rows.shape[1], dtype=dtype)


def _d_head(
    head: Head,
    grad_losses: Tensor,  # [M]
    options: LossOptions,
    weight_gradient: bool,
    bias_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    logits, weight, bias = _Logits(head, options, backend), head.weight, head.bias
    if logits.scored is not None:
        grad_losses = grad_losses[logits.scored]
    losses = torch.empty_like(logits.targets, dtype=logits.loss_dtype)
    vocab_size, width = weight.shape
    d_weight = weight.new_zeros(vocab_size if weight_gradient else 0, width, dtype=logits.loss_dtype)
    d_bias = weight.new_zeros(vocab_size if bias_gradient else 0, dtype=logits.loss_dtype)
    for chunk, d_logits in logits.chunks(losses, grad_losses.contiguous(), gradient=True):
        if weight_gradient:
            if d_weight.dtype == d_logits.dtype:
                d_weight.addmm_(d_logits.t(), logits.rows[chunk])
            else:
                d_weight += torch.mm(d_logits.t(), logits.rows[chunk])
        if bias_gradient:
            d_bias += d_logits.sum(0, dtype=d_bias.dtype)
    return d_weight.to(weight.dtype), d_bias if bias is None else d_bias.to(bias.dtype)


def _d_head_fake(
    head: Head,
    grad_losses: Tensor,
    options: LossOptions,
    weight_gradient: bool,
    bias_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    weight, bias = head.weight, head.bias
    d_weight = weight.new_empty(weight.shape[0] if weight_gradient else 0, weight.shape[1])
    bias_dtype = loss_dtype(weight) if bias is None else bias.dtype
    return d_weight, weight.new_empty(weight.shape[0] if bias_gradient else 0, dtype=bias_dtype)


def _setup_context(ctx: Any, inputs: list[Any], output: tuple[Tensor, Tensor]) -> None:
    head, ctx.options, gradient, ctx.backend = inputs
    hidden, weight, bias, label_rows, targets = head
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.num_rows, ctx.hidden_dtype = hidden.shape[0], hidden.dtype
    # A frozen head needs nothing but the gradient that is there: hidden and weight are not held.
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    held = (None, None, None, None) if frozen else (hidden, weight, bias, targets)
    ctx.save_for_backward(output[1] if gradient else None, label_rows, *held)


def _backward(ctx: Any, grad_losses: Tensor | None, _: Tensor | None) -> dict[str, Tensor | None]:
    if torch.is_grad_enabled():
        # The gradient was made in the forward: to autograd it is a constant, and its derivative would be 0.
        raise RuntimeError("linear_cross_entropy has no second derivative: got create_graph=True")
    if grad_losses is None:
        return {}
    grads: dict[str, Tensor | None] = {}
    d_rows, label_rows, hidden, weight, bias, targets = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    if wanted[0]:
        grads["hidden"] = _D_HIDDEN(d_rows, grad_losses, label_rows, ctx.num_rows, ctx.hidden_dtype)
    if wanted[1] or wanted[2]:
        head = Head(hidden, weight, bias, label_rows, targets)
        d_weight, d_bias = _D_HEAD(*head, grad_losses, *ctx.options, *wanted[1:], ctx.backend)
        grads["weight"], grads["bias"] = d_weight if wanted[1] else None, d_bias if wanted[2] else None
    return grads


_ROWS = Backends(
    "linear_cross_entropy",
    reference.rows_loss_and_gradient_,
    native=native.rows_loss_and_gradient_,
    triton="softprompt.ops.linear_cross_entropy.triton:rows_loss_and_gradient_",
)
_LOSSES = define(
    "linear_cross_entropy", _losses, fake=_losses_fake, backward=_backward, setup_context=_setup_context
)
_D_HIDDEN = define("linear_cross_entropy_d_hidden", _d_hidden, fake=_d_hidden_fake)
_D_HEAD = define("linear_cross_entropy_d_head", _d_head, fake=_d_head_fake)
