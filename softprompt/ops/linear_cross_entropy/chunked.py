"""The matrix products around a back end's row function, a chunk of label rows at a time, and the schemas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from softprompt.ops.linear_cross_entropy.products import d_rows_of, logits_of
from softprompt.ops.registry import choose_backend, define

# A chunk reads the whole weight, so below about 200 rows on a GPU its time does not depend on the rows.
_GPU_CHUNK_BYTES, _GPU_CHUNK_ROWS = 128 << 20, 1024
_CPU_CHUNK_BYTES, _CPU_CHUNK_ROWS = 128 << 20, 1
_ACCUMULATOR_BYTES = 64 << 20
# Rows of the logits are whole blocks of 32 entries: kernels can use vector loads for any V, and a library's
# product that takes a row in blocks (AMX: 64 bytes, whatever V is) stays within the row.
_ROW_ALIGNMENT = 32


def losses_of_rows(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    label_rows: Tensor | None,  # [M]
    targets: Tensor,  # [M]
    *,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """The [M] losses, differentiable once in `hidden`, `weight` and `bias`."""
    losses, _ = _LOSSES(
        hidden,
        weight,
        bias,
        label_rows,
        targets,
        softcap,
        logit_scale,
        label_smoothing,
        ignore_index,
        torch.is_grad_enabled() and hidden.requires_grad,
        backend,
    )
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


class _Head:
    """One call's logits: gathered rows, their targets, and a buffer that every chunk reuses."""

    def __init__(
        self,
        hidden: Tensor,  # [T, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        label_rows: Tensor | None,  # [M]
        targets: Tensor,  # [M]
        ignore_index: int,
        backend: str,
        **options: Any,
    ) -> None:
        self.backend = choose_backend("linear_cross_entropy", backend, hidden.device)
        self.weight = weight
        self.bias = bias
        self.options = {"ignore_index": ignore_index, **options}
        self.loss_dtype = loss_dtype(weight)
        self.scored: Tensor | None = None
        on_cpu = hidden.device.type == "cpu"
        if on_cpu:
            _check_range("targets", targets, weight.shape[0], ignored=ignore_index)
            if label_rows is not None:
                _check_range("label_rows", label_rows, hidden.shape[0])
        if label_rows is None or on_cpu:
            self.scored = (targets != ignore_index).nonzero().squeeze(1)
            targets = targets[self.scored]
            label_rows = self.scored if label_rows is None else label_rows[self.scored]
        self.targets = targets
        self.rows = hidden.index_select(0, label_rows).to(weight.dtype)

    def chunks(
        self,
        losses: Tensor,  # [rows]
        grad_losses: Tensor | None,  # [rows]
        *,
        gradient: bool,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Fills `losses` and yields each chunk's rows with its d(logits), valid until the next chunk."""
        num_rows, vocab_size = self.rows.shape[0], self.weight.shape[0]
        row_function = _row_function(self.backend)
        row_length = -(-vocab_size // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
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
                gradient=gradient,
                **self.options,
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


def _row_function(backend: str) -> Callable[..., None]:
    if backend == "triton":
        from softprompt.ops.linear_cross_entropy.triton import rows_loss_and_gradient_ as implementation
    elif backend == "native":
        from softprompt.ops.linear_cross_entropy.native import rows_loss_and_gradient_ as implementation
    else:
        from softprompt.ops.linear_cross_entropy.reference import rows_loss_and_gradient_ as implementation
    return implementation


def _check_range(name: str, indices: Tensor, size: int, ignored: int | None = None) -> None:
    outside = (indices < 0) | (indices >= size)
    expected = f"0 .. {size - 1}"
    if ignored is not None:
        outside &= indices != ignored
        expected += f" or {ignored} (ignored)"
    if outside.any():
        place = int(outside.nonzero()[0])
        raise IndexError(f"{name}[{place}] is {int(indices[place])}, expected {expected}")


def _losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label_rows: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    ignore_index: int,
    gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    head = _Head(
        hidden,
        weight,
        bias,
        label_rows,
        targets,
        ignore_index,
        backend,
        softcap=softcap,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
    )
    num_scored = head.rows.shape[0]
    losses = weight.new_empty(num_scored, dtype=head.loss_dtype)
    d_rows = weight.new_empty(num_scored if gradient else 0, hidden.shape[1])
    for chunk, d_logits in head.chunks(losses, None, gradient=gradient):
        if gradient:
            d_rows_of(d_logits, weight, d_rows[chunk], head.backend)
    num_rows = targets.shape[0]
    return head.spread(losses, num_rows), head.spread(d_rows, num_rows) if gradient else d_rows


def _losses_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label_rows: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    ignore_index: int,
    gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    num_rows = targets.shape[0]
    losses = weight.new_empty(num_rows, dtype=loss_dtype(weight))
    return losses, weight.new_empty(num_rows if gradient else 0, hidden.shape[1])


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
    d_rows: Tensor,
    grad_losses: Tensor,
    label_rows: Tensor | None,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    return d_rows.new_empty(num_rows, d_rows.shape[1], dtype=dtype)


def _d_head(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    label_rows: Tensor | None,  # [M]
    targets: Tensor,  # [M]
    grad_losses: Tensor,  # [M]
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    ignore_index: int,
    weight_gradient: bool,
    bias_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    head = _Head(
        hidden,
        weight,
        bias,
        label_rows,
        targets,
        ignore_index,
        backend,
        softcap=softcap,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
    )
    if head.scored is not None:
        grad_losses = grad_losses[head.scored]
    losses = torch.empty_like(head.targets, dtype=head.loss_dtype)
    vocab_size, width = weight.shape
    d_weight = weight.new_zeros(vocab_size if weight_gradient else 0, width, dtype=head.loss_dtype)
    d_bias = weight.new_zeros(vocab_size if bias_gradient else 0, dtype=head.loss_dtype)
    for chunk, d_logits in head.chunks(losses, grad_losses.contiguous(), gradient=True):
        if weight_gradient:
            if d_weight.dtype == d_logits.dtype:
                d_weight.addmm_(d_logits.t(), head.rows[chunk])
            else:
                d_weight += torch.mm(d_logits.t(), head.rows[chunk])
        if bias_gradient:
            d_bias += d_logits.sum(0, dtype=d_bias.dtype)
    return d_weight.to(weight.dtype), d_bias if bias is None else d_bias.to(bias.dtype)


def _d_head_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label_rows: Tensor | None,
    targets: Tensor,
    grad_losses: Tensor,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    ignore_index: int,
    weight_gradient: bool,
    bias_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    d_weight = weight.new_empty(weight.shape[0] if weight_gradient else 0, weight.shape[1])
    bias_dtype = loss_dtype(weight) if bias is None else bias.dtype
    return d_weight, weight.new_empty(weight.shape[0] if bias_gradient else 0, dtype=bias_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, label_rows, targets, *options, gradient, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.num_rows, ctx.hidden_dtype = hidden.shape[0], hidden.dtype
    ctx.options, ctx.backend = options, backend
    ctx.head_gradient = weight.requires_grad or (bias is not None and bias.requires_grad)
    # A frozen head needs nothing but the gradient that is there: hidden and weight are not held.
    head = (hidden, weight, bias, targets) if ctx.head_gradient else (None, None, None, None)
    ctx.save_for_backward(output[1] if gradient else None, label_rows, *head)


def _backward(ctx: Any, grad_losses: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        # The gradient was made in the forward: to autograd it is a constant, and its derivative would be 0.
        raise RuntimeError("linear_cross_entropy has no second derivative: got create_graph=True")
    d_hidden = d_weight = d_bias = None
    if grad_losses is not None:
        d_rows, label_rows, hidden, weight, bias, targets = ctx.saved_tensors
        hidden_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad[:3]
        if hidden_wanted:
            d_hidden = _D_HIDDEN(d_rows, grad_losses, label_rows, ctx.num_rows, ctx.hidden_dtype)
        if weight_wanted or bias_wanted:
            d_weight, d_bias = _D_HEAD(
                hidden,
                weight,
                bias,
                label_rows,
                targets,
                grad_losses,
                *ctx.options,
                weight_wanted,
                bias_wanted,
                ctx.backend,
            )
    return (
        d_hidden,
        d_weight if ctx.needs_input_grad[1] else None,
        d_bias if ctx.needs_input_grad[2] else None,
        *[None] * 8,
    )


_HEAD_OPTIONS = "float? softcap, float logit_scale, float label_smoothing, int ignore_index"
_HEAD_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? label_rows, Tensor targets"
_LOSSES = define(
    f"linear_cross_entropy({_HEAD_TENSORS}, {_HEAD_OPTIONS}, bool gradient, str backend) -> (Tensor, Tensor)",
    _losses,
    fake=_losses_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_D_HIDDEN = define(
    "linear_cross_entropy_d_hidden("
    "Tensor d_rows, Tensor grad_losses, Tensor? label_rows, SymInt num_rows, ScalarType dtype) -> Tensor",
    _d_hidden,
    fake=_d_hidden_fake,
)
_D_HEAD = define(
    f"linear_cross_entropy_d_head({_HEAD_TENSORS}, Tensor grad_losses, {_HEAD_OPTIONS}, "
    "bool weight_gradient, bool bias_gradient, str backend) -> (Tensor, Tensor)",
    _d_head,
    fake=_d_head_fake,
)
