"""The packed row that the attentions are compared on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.problem import Outputs, dtype_of
from benchmarks.texts import EvenLengths, TextLengths
from softprompt.layout import build_layout
from softprompt.ops.shared_prompt_attention import AttentionLayout

_BLOCK = 128  # T is a multiple of it, as FlexAttention's blocks want it


@dataclass(frozen=True)
class AttentionSizes:
    """A packed row and its heads."""

    texts: TextLengths | EvenLengths
    rows: int  # B
    num_virtual_tokens: int  # P
    num_heads: int  # Hq
    num_key_heads: int  # Hkv
    head_dim: int  # D
    alibi: bool = False
    backward: bool = False


@dataclass(frozen=True, eq=False)
class AttentionProblem:
    """Tensors of one attention."""

    query: Tensor  # [Hq, T, D]
    key: Tensor  # [Hkv, T, D]
    value: Tensor  # [Hkv, T, D]
    d_out: Tensor  # [Hq, T, D], zero at dummies
    layout: AttentionLayout
    lengths: tuple[int, ...]  # of the texts
    slopes: Tensor | None  # [Hq]
    backward: bool

    @property
    def prompt(self) -> int:
        """P."""
        return self.layout.prompt_lengths[0]

    @property
    def live(self) -> int:
        """P + N."""
        return self.layout.num_live

    def results(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Outputs]:
        """What is timed: the output, and with `backward` the three gradients."""

        def forward() -> Outputs:
            with torch.no_grad():
                return (attend(self.query, self.key, self.value),)

        def both() -> Outputs:
            out = attend(self.query, self.key, self.value)
            return out.detach(), *torch.autograd.grad(out, (self.query, self.key, self.value), self.d_out)

        return both if self.backward else forward

    def cut(self, outputs: Outputs) -> Outputs:
        """Without the dummies, which see only themselves."""
        return tuple(tensor[:, : self.live] for tensor in outputs)


def attention_problem(sizes: AttentionSizes, device: str) -> AttentionProblem:
    """Random heads on the row of these texts, right-padded before they are packed."""
    lengths = tuple(sum(row) for row in sizes.texts.sample(sizes.rows))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(device)
    layout = build_layout(
        mask, [sizes.num_virtual_tokens], token_bucket=_BLOCK, backend="reference"
    ).attention
    torch.manual_seed(0)

    def heads(count: int) -> Tensor:
        # A token's heads stand together, as models produce them.
        shape = (layout.num_rows, count, sizes.head_dim)
        return torch.randn(shape, device=device, dtype=dtype_of(device)).transpose(0, 1)

    query, key, value, d_out = (
        heads(count) for count in (sizes.num_heads, sizes.num_key_heads, sizes.num_key_heads, sizes.num_heads)
    )
    d_out = d_out.clone()
    d_out[:, layout.num_live :] = 0
    slopes = None
    if sizes.alibi:
        slopes = 2.0 ** (-8 * torch.arange(1, sizes.num_heads + 1, device=device) / sizes.num_heads)
    for tensor in (query, key, value):
        tensor.requires_grad_(sizes.backward)
    return AttentionProblem(query, key, value, d_out, layout, lengths, slopes, sizes.backward)
