"""shared_prompt_attention, forward alone or with its backward."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.kernels import flex, padded
from benchmarks.kernels.attention_problem import AttentionProblem, AttentionSizes, attention_problem
from benchmarks.kernels.problem import KernelVariant, NotAvailable, Outputs, Problem, backend_variants
from softprompt.ops.shared_prompt_attention import shared_prompt_attention

_BACKENDS = ("triton", "native", "sdpa", "reference")
_DENSE_BYTES = 4 << 30  # of the [Hq, T, T] scores, above which the dense reference is not run


def attention(sizes: AttentionSizes, device: str) -> Problem:
    """The op's back ends, FlexAttention on the same layout, and SDPA over the padded batch."""
    problem = attention_problem(sizes, device)

    def own(backend: str) -> Outputs:
        if backend == "reference":
            scores = 4 * sizes.num_heads * problem.live**2
            if scores > _DENSE_BYTES:
                raise NotAvailable(f"its [Hq, T, T] scores need {scores / 1e9:.0f} GB each")
        return problem.results(
            lambda q, k, v: shared_prompt_attention(
                q, k, v, problem.layout, alibi_slopes=problem.slopes, backend=backend
            )
        )()

    own_variants = (
        replace(variant, comparable=problem.cut)
        for variant in backend_variants(own, _BACKENDS, optional=("reference",))
    )
    pairs = _triangle(problem.prompt) + sum(problem.prompt * n + _triangle(n) for n in problem.lengths)
    columns = problem.live * sizes.head_dim * problem.query.element_size()
    moved = columns * (2 * sizes.num_heads + 2 * sizes.num_key_heads)
    share = 3 if sizes.backward else 1  # four products in the backward, two in the forward
    return Problem(
        (
            *own_variants,
            KernelVariant("flex", lambda: flex.prepared(problem), compiles=True, comparable=problem.cut),
            *padded.variants(problem),
        ),
        lambda: truth(problem),
        tolerances(device, sizes.backward),
        4 * share * sizes.num_heads * sizes.head_dim * pairs,
        share * moved,
    )


def tolerances(device: str, backward: bool) -> tuple[float, ...]:
    """Of the output and the three gradients."""
    out, grad = (1e-2, 2e-2) if device == "cuda" else (1e-5, 1e-4)
    return (out, grad, grad, grad) if backward else (out,)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def truth(problem: AttentionProblem) -> Outputs:
    """Text after text in fp32 (fp64 on a CPU), each behind its prompt, whose keys get all texts' shares."""
    wide = torch.float32 if problem.query.device.type == "cuda" else torch.float64
    prompt, live = problem.prompt, problem.live
    rows = [tensor.detach()[:, :live].to(wide) for tensor in (problem.query, problem.key, problem.value)]
    d_out = problem.d_out[:, :live].to(wide)
    out = torch.empty_like(d_out)
    grads = [torch.zeros_like(tensor) for tensor in rows]
    start = prompt
    # The prompt among itself first, then each text behind it.
    for length in (0, *problem.lengths):
        own = torch.cat(
            [torch.arange(prompt), torch.arange(start, start + length) if length else torch.arange(0)]
        ).to(d_out.device)
        queries = own if not length else own[prompt:]
        start += length
        q, k, v = (rows[0][:, queries], rows[1][:, own], rows[2][:, own])
        for tensor in (q, k, v):
            tensor.requires_grad_(problem.backward)
        with torch.set_grad_enabled(problem.backward):
            part = _attend(q, k, v, problem.slopes)
        out[:, queries] = part.detach()
        if problem.backward:
            found = torch.autograd.grad(part, (q, k, v), d_out[:, queries])
            for total, grad, index in zip(grads, found, (queries, own, own), strict=True):
                total[:, index] += grad
    return (out, *grads) if problem.backward else (out,)


def _attend(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None) -> Tensor:
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = query @ key.transpose(1, 2) * query.shape[2] ** -0.5
    count, keys = query.shape[1], key.shape[1]
    distance = (
        torch.arange(keys, device=key.device)[None]
        - torch.arange(keys - count, keys, device=key.device)[:, None]
    )
    if slopes is not None:
        scores = scores + slopes.to(scores.dtype)[:, None, None] * distance
    return scores.masked_fill(distance > 0, -torch.inf).softmax(2) @ value
