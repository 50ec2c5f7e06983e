"""SDPA over the padded batch, every row with its own copy of the prompt: what models do without packing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels.attention_problem import AttentionProblem
from benchmarks.kernels.problem import KernelVariant, NotAvailable, Outputs


def variants(problem: AttentionProblem) -> tuple[KernelVariant, ...]:
    """With the mask that transformers makes of a padded batch, and causal alone, which right pads allow."""
    made = _Padded(problem)
    return (
        KernelVariant("sdpa padded, mask", made.masked, comparable=made.packed),
        KernelVariant("sdpa padded, causal", made.causal, comparable=made.packed),
    )


class _Padded:
    """The padded batch [B, P + L]: rows `[prompt | text | pads]`."""

    def __init__(self, problem: AttentionProblem) -> None:
        self._problem = problem
        device = problem.query.device
        prompt, longest = problem.prompt, max(problem.lengths)
        lengths = torch.tensor(problem.lengths, device=device)[:, None]
        starts = prompt + torch.cumsum(lengths, 0) - lengths
        column = torch.arange(longest, device=device)
        shape = (len(problem.lengths), -1)
        texts = torch.where(column < lengths, starts + column, 0)
        prompts = torch.arange(prompt, device=device).expand(*shape)
        self._index = torch.cat([prompts, texts], 1)  # [B, S] packed row of each place
        is_text = torch.cat([torch.zeros_like(prompts, dtype=torch.bool), column < lengths], 1)
        self._is_token = is_text | (torch.arange(self._index.shape[1], device=device) < prompt)
        # Each packed row once: the prompt's in the first row of the batch.
        self._is_own = is_text.clone()
        self._is_own[0, :prompt] = True

    def _heads(self, tensor: Tensor, *, gradient: bool) -> Tensor:
        """[B, heads, S, D]."""
        gathered = tensor.detach()[:, self._index].transpose(0, 1).contiguous()
        return gathered.requires_grad_(gradient)

    def masked(self) -> Callable[[], Outputs]:
        """A [B, 1, S, S] bool mask, or with ALiBi the [B, Hq, S, S] bias, made once as for a whole step."""
        problem = self._problem
        size = self._index.shape[1]
        places = torch.arange(size, device=self._index.device)
        seen = (places[None] <= places[:, None]) & self._is_token[:, None, None, :]
        mask = seen
        if problem.slopes is not None:
            distance = (places[None] - places[:, None]).float()
            bias = problem.slopes.float()[:, None, None] * distance
            mask = bias[None].masked_fill(~seen, -torch.inf).to(problem.query.dtype)
        return self._prepared(attn_mask=mask)

    def causal(self) -> Callable[[], Outputs]:
        """No mask: pads stand behind the texts, and nothing of them is read."""
        if self._problem.slopes is not None:
            raise NotAvailable("ALiBi needs a bias, which is_causal does not take")
        return self._prepared(is_causal=True)

    def _prepared(self, **options: object) -> Callable[[], Outputs]:
        problem = self._problem
        heads = [
            self._heads(tensor, gradient=problem.backward)
            for tensor in (problem.query, problem.key, problem.value)
        ]
        d_out = self._heads(problem.d_out, gradient=False)
        d_out *= self._is_own[:, None, :, None]
        grouped = heads[0].shape[1] != heads[1].shape[1]

        def run() -> Outputs:
            with torch.set_grad_enabled(problem.backward):
                out = functional.scaled_dot_product_attention(*heads, enable_gqa=grouped, **options)
            if not problem.backward:
                return (out,)
            return out.detach(), *torch.autograd.grad(out, heads, d_out)

        return run

    def packed(self, outputs: Outputs) -> Outputs:
        """The packed rows; gradients of the prompt's are summed over the batch, in fp32 or better."""
        out, *grads = outputs
        first = self._sum(out.detach() * self._is_own[:, None, :, None])
        return (first, *(self._sum(grad * self._is_token[:, None, :, None]) for grad in grads))

    def _sum(self, padded: Tensor) -> Tensor:
        rows = padded.double().transpose(0, 1).flatten(1, 2)  # [heads, B * S, D]
        total = rows.new_zeros(rows.shape[0], self._problem.live, rows.shape[2])
        return total.index_add_(1, self._index.flatten(), rows)
