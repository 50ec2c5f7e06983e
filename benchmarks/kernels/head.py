"""linear_cross_entropy: loss and d(hidden) of M label rows of a frozen head."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import peers
from benchmarks.kernels.problem import (
    KernelVariant,
    NotAvailable,
    Outputs,
    Problem,
    backend_variants,
    compiled,
    dtype_of,
)
from softprompt.ops.linear_cross_entropy import linear_cross_entropy
from softprompt.ops.linear_cross_entropy.reference import linear_cross_entropy_ref

_TRUTH_ROWS = 512


@dataclass(frozen=True)
class HeadSizes:
    """A head and its label rows."""

    hidden_size: int  # H
    vocab_size: int  # V
    rows: int  # M


_WEIGHTS: dict[Any, Tensor] = {}


def _weight(sizes: HeadSizes, device: str) -> Tensor:
    """[V, H], kept for the cases of one head."""
    key = (sizes.hidden_size, sizes.vocab_size, device)
    if key not in _WEIGHTS:
        _WEIGHTS.clear()
        torch.manual_seed(0)
        # As large as trained heads are: the logits' spread is about 1.
        weight = torch.randn(sizes.vocab_size, sizes.hidden_size, device=device, dtype=dtype_of(device))
        _WEIGHTS[key] = weight.mul_(sizes.hidden_size**-0.5)
    return _WEIGHTS[key]


def forget() -> None:
    """Drops the kept weight."""
    _WEIGHTS.clear()


def head(sizes: HeadSizes, device: str) -> Problem:
    """The op's back ends and others' fused heads."""
    weight = _weight(sizes, device)
    torch.manual_seed(1)
    hidden = torch.randn(sizes.rows, sizes.hidden_size, device=device, dtype=weight.dtype)
    hidden.requires_grad_()
    targets = torch.randint(0, sizes.vocab_size, (sizes.rows,), device=device)
    label_rows = torch.arange(sizes.rows, device=device)

    def truth() -> Outputs:
        wide = torch.float32 if device == "cuda" else torch.float64
        full = weight.to(wide)
        total = torch.zeros((), dtype=torch.float64, device=device)
        grads = []
        for start in range(0, sizes.rows, _TRUTH_ROWS):
            part = hidden.detach()[start : start + _TRUTH_ROWS].to(wide)
            target = targets[start : start + _TRUTH_ROWS]
            log_probabilities = (part @ full.t()).log_softmax(1)
            total -= log_probabilities.gather(1, target[:, None]).double().sum()
            off = log_probabilities.exp_()
            off.scatter_add_(1, target[:, None], -torch.ones_like(off[:, :1]))
            grads.append(off @ full / sizes.rows)
        return total / sizes.rows, torch.cat(grads)

    def both(loss_of: Callable[[], Tensor]) -> Callable[[], Outputs]:
        def run() -> Outputs:
            loss = loss_of()
            (grad,) = torch.autograd.grad(loss, hidden)
            return loss.detach(), grad

        return run

    def own(backend: str) -> Outputs:
        return both(lambda: linear_cross_entropy(hidden, weight, label_rows, targets, backend=backend))()

    def compile_reference() -> Callable[[], Outputs]:
        run = compiled(linear_cross_entropy_ref, dynamic=True)
        return both(lambda: run(hidden, weight, None, targets))

    def peer(loss: peers.HeadLoss, module: str, package: str) -> Callable[[], Callable[[], Outputs]]:
        def make() -> Callable[[], Outputs]:
            if importlib.util.find_spec(module) is None:
                raise NotAvailable(f"{package} is not installed")
            return both(lambda: loss(hidden, weight, targets))

        return make

    def torch_op() -> Callable[[], Outputs]:
        function = getattr(functional, "linear_cross_entropy", None)
        options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
        if function is None or options is None:
            raise NotAvailable(f"torch {torch.__version__} has no chunked functional.linear_cross_entropy")
        return both(lambda: function(hidden, weight, targets, options=options()))

    tolerances = (1e-3, 1e-2) if device == "cuda" else (1e-5, 1e-4)
    products = 2 * 2 * sizes.rows * sizes.hidden_size * sizes.vocab_size
    return Problem(
        (
            *backend_variants(own, ("triton", "native", "reference"), optional=("reference",)),
            KernelVariant("cce", peer(peers.cce_loss, "cut_cross_entropy", "cut-cross-entropy")),
            KernelVariant("liger", peer(peers.liger_loss, "liger_kernel", "liger-kernel")),
            KernelVariant("torch", torch_op),
            KernelVariant(
                "trl-style chunks", lambda: both(lambda: peers.chunked_loss(hidden, weight, targets))
            ),
            KernelVariant(
                "plain torch",
                lambda: both(lambda: linear_cross_entropy_ref(hidden, weight, None, targets)),
                optional=True,
            ),
            KernelVariant("plain torch+compile", compile_reference, optional=True, compiles=True),
        ),
        truth,
        tolerances,
        products,
        2 * weight.numel() * weight.element_size(),
    )
