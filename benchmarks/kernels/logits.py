"""The rows of linear_cross_entropy: what becomes of logits that are there."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch.nn import functional

from benchmarks.kernels.head import HeadSizes
from benchmarks.kernels.problem import KernelVariant, NotAvailable, Outputs, Problem, dtype_of
from softprompt.ops.linear_cross_entropy.arguments import LossOptions
from softprompt.ops.registry import availability

_BACKENDS = ("triton", "native", "reference")


def logit_rows(sizes: HeadSizes, device: str) -> Problem:
    """The back ends' row functions, on a copy of the logits, and PyTorch's cross-entropy and its gradient."""
    torch.manual_seed(0)
    logits = torch.randn(sizes.rows, sizes.vocab_size, device=device, dtype=dtype_of(device))
    targets = torch.randint(0, sizes.vocab_size, (sizes.rows,), device=device)

    def truth() -> Outputs:
        wide = logits.double().requires_grad_()
        losses = functional.cross_entropy(wide, targets, reduction="none")
        return losses.detach(), *torch.autograd.grad(losses.sum(), wide)

    def own(backend: str) -> Callable[[], Callable[[], Outputs]]:
        def make() -> Callable[[], Outputs]:
            found = availability(backend, device)
            if not found.usable:
                raise NotAvailable(found.reason)
            module = importlib.import_module(f"softprompt.ops.linear_cross_entropy.{backend}")
            length = -(-sizes.vocab_size // 16) * 16
            buffer = logits.new_empty(sizes.rows, length)[:, : sizes.vocab_size]
            losses = torch.empty(sizes.rows, device=device)

            def run() -> Outputs:
                buffer.copy_(logits)
                module.rows_loss_and_gradient_(
                    buffer, None, targets, losses, None, LossOptions(), gradient=True
                )
                return losses, buffer

            return run

        return make

    def plain() -> Outputs:
        leaf = logits.detach().requires_grad_()
        losses = functional.cross_entropy(leaf, targets, reduction="none")
        return losses.detach(), *torch.autograd.grad(losses.sum(), leaf)

    moved = 2 * logits.numel() * logits.element_size()
    return Problem(
        (
            *(KernelVariant(name, own(name), own=True, optional=name == "reference") for name in _BACKENDS),
            KernelVariant("plain torch", lambda: plain),
        ),
        truth,
        (1e-2, 1e-2) if device == "cuda" else (1e-5, 1e-5),
        0,
        moved,
    )
