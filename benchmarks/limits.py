"""How fast a step can get: its tokens, its FLOP, its bytes, and what the device does of them in a second.

The base is frozen, so a weight costs 2 FLOP a token in the forward and 2 in the backward (the gradient of the
input, none of the weight): 4 in all. PEFT runs body and head over B x (P + L) tokens. Without repeated
prompts, pads and unlabelled head rows, P + sum L_i tokens of the body and M rows of the head are left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.cases import StepBatch

_REPEATS = 5
_CALLS = 10
_MATMUL_SIZE = {"cpu": 3072, "cuda": 8192}
_COPY_BYTES = {"cpu": 1 << 29, "cuda": 1 << 31}


@dataclass(frozen=True)
class Work:
    """What one step has to do."""

    body_weights: int  # N_body: weights of the linear layers below the head
    head_weights: int  # H x V
    body_tokens: int  # P + sum L_i
    peft_tokens: int  # B x (P + L)
    head_rows: int  # M
    attention_pairs: int  # (query, key) pairs that may see each other, prompt once
    peft_attention_pairs: int  # B x (P + L)^2, the square that a padded batch computes
    attention_width: int  # layers x heads x head dim
    weight_bytes: int  # of body and head

    @property
    def token_flop(self) -> int:
        """`4 N_body (P + sum L_i) + 4 H V M`."""
        return 4 * (self.body_weights * self.body_tokens + self.head_weights * self.head_rows)

    @property
    def peft_token_flop(self) -> int:
        """`4 (N_body + H V) B (P + L)`."""
        return 4 * (self.body_weights + self.head_weights) * self.peft_tokens

    @property
    def token_limit(self) -> float:
        """How many times fewer FLOP in linear layers than PEFT's; attention pairs are not in it."""
        return self.peft_token_flop / self.token_flop

    @property
    def attention_flop(self) -> int:
        """Two matrix products in the forward and four in the backward: 12 FLOP a pair and column."""
        return 12 * self.attention_width * self.attention_pairs

    @property
    def peft_attention_flop(self) -> int:
        """The same for the padded batch."""
        return 12 * self.attention_width * self.peft_attention_pairs

    @property
    def moved_bytes(self) -> int:
        """Body and head weights, read in the forward and in the backward."""
        return 2 * self.weight_bytes


def work_of(model: PreTrainedModel, batch: StepBatch, num_virtual_tokens: int, num_prompts: int = 1) -> Work:
    """The work of one step of `model` (the base model) on `batch`, with each of K prompts."""
    linear = [module.weight for module in model.base_model.modules() if isinstance(module, nn.Linear)]
    head = model.get_output_embeddings().weight
    config, prompt = model.config, num_virtual_tokens
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    body_weights = sum(weight.numel() for weight in linear)
    row_length = prompt + batch.padded_length
    return Work(
        body_weights=body_weights,
        head_weights=head.numel(),
        body_tokens=num_prompts * (prompt + sum(batch.lengths)),
        peft_tokens=num_prompts * len(batch.lengths) * row_length,
        head_rows=num_prompts * batch.num_labels,
        attention_pairs=num_prompts
        * (_triangle(prompt) + sum(prompt * n + _triangle(n) for n in batch.lengths)),
        peft_attention_pairs=num_prompts * len(batch.lengths) * row_length**2,
        attention_width=config.num_hidden_layers * config.num_attention_heads * head_dim,
        weight_bytes=(body_weights + head.numel()) * head.element_size(),
    )


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


@dataclass(frozen=True)
class Ceilings:
    """What the device does in a second: the best of some large matrix products and copies."""

    flop_per_second: float
    bytes_per_second: float  # read + written

    def floor_seconds(self, work: Work) -> float:
        """No step is faster than its FLOP at the peak, nor than its bytes at the bandwidth."""
        return self.floor_of(work.token_flop + work.attention_flop, work.moved_bytes)

    def floor_of(self, flop: float, moved_bytes: float) -> float:
        """The same for any FLOP and bytes."""
        return max(flop / self.flop_per_second, moved_bytes / self.bytes_per_second)


def measure_ceilings(dtype: torch.dtype, device: str, *, shrink: int = 1) -> Ceilings:
    """Times a square matrix product and a copy, each the best of some repeats.

    Args:
        dtype: of the case.
        device: of the case.
        shrink: divides the matrix side and the copied bytes, to test the runner.
    """
    side = _MATMUL_SIZE[device] // shrink
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.ones(_COPY_BYTES[device] // shrink, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return Ceilings(
        flop_per_second=2 * side**3 / _best_seconds(lambda: torch.mm(left, right, out=product), device),
        bytes_per_second=2 * source.numel() / _best_seconds(lambda: target.copy_(source), device),
    )


def _best_seconds(run: Callable[[], object], device: str) -> float:
    seconds = []
    calls = 1 if device == "cpu" else _CALLS  # so many that the wait for the GPU does not count
    for _ in range(1 + _REPEATS):
        start = now(device)
        for _ in range(calls):
            run()
        seconds.append((now(device) - start) / calls)
    return min(seconds[1:])


def now(device: str) -> float:
    """Seconds, with everything done that was asked of the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
