"""Peak memory of a step above what was there before its variant.

On CUDA: the most bytes that torch's allocator gave out during one warmed-up step, less what was given out
before the variant was built. A recorded step (CUDA graph) works in a private pool, whose blocks are not given
out again when it is replayed: the pools count as a whole, with what lies unused in them. Variants whose
graphs share a pool are charged with all of it, and none with the pools of others. Every variant pays for its
own workspaces of cuBLAS. On the CPU: see `softprompt.tasks.compare.profiled_peak_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import GENERATE, Case
from benchmarks.runner import Runner
from softprompt.engine.cuda_graph import RECORDERS
from softprompt.tasks.compare import profiled_peak_bytes

_DEFAULT_POOL = (0, 0)


def allocated(device: str) -> int:
    """Bytes that torch's allocator has given out."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


@dataclass(frozen=True)
class Before:
    """What there was before a variant was built."""

    given_out: int  # bytes
    pools: frozenset[Any] = frozenset()  # private ones, of others


def look_before(device: str, *, own: bool) -> Before:
    """To be asked before a variant is built.

    Args:
        device: of the case.
        own: whether the variant is softprompt, whose recorded steps share a pool.
    """
    if device != "cuda":
        return Before(0)
    # The first variant would pay for what all use: PyTorch keeps them by stream.
    torch._C._cuda_clearCublasWorkspaces()
    shared = RECORDERS["cuda"].pools() if own else frozenset()
    return Before(allocated(device), frozenset(map(_pool_of, torch.cuda.memory_snapshot())) - shared)


def peak_of(runner: Runner, case: Case, before: Before) -> int | None:
    """Peak of one step of a runner that is warmed up.

    None on a CPU for generation and for peers, whose memory only CUDA's counters see.
    """
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        runner.forward_backward()
        runner.forget()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before.given_out
        if runner.variant.keeps_memory:
            peak += unused_in_pools(before.pools)
        return int(peak)
    if case.kind == GENERATE or not (runner.variant.own or runner.name == "peft"):
        return None

    def step() -> None:
        runner.forward_backward()
        runner.forget()

    return profiled_peak_bytes(step)


def unused_in_pools(others: frozenset[Any]) -> int:
    """Bytes of private pools that are not given out now, without those of others."""
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if _pool_of(segment) not in {_DEFAULT_POOL, *others}
    )


def _pool_of(segment: dict[str, Any]) -> tuple[int, int]:
    return tuple(segment.get("segment_pool_id", _DEFAULT_POOL))


def capacity() -> int:
    """Bytes of the GPU."""
    return int(torch.cuda.get_device_properties(0).total_memory)
