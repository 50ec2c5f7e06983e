"""Peak memory of a step above what was there before its variant.

On CUDA: the most bytes that torch's allocator gave out during one warmed-up step, less what was given out
before the variant was built. A recorded step (CUDA graph) works in a private pool, whose blocks are not given
out again when it is replayed: the pools count as a whole, with what lies unused in them. Variants whose
graphs share a pool are charged with all of it. On the CPU: `softprompt.tasks.compare.profiled_peak_bytes`.
"""

from __future__ import annotations

import torch

from benchmarks.cases import GENERATE, Case
from benchmarks.runner import Runner
from softprompt.tasks.compare import profiled_peak_bytes

_DEFAULT_POOL = (0, 0)


def allocated(device: str) -> int:
    """Bytes that torch's allocator has given out."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def peak_of(runner: Runner, case: Case, before: int) -> int | None:
    """Peak of one step of a runner that is warmed up; `before` is what `allocated` said before it was built.

    None on a CPU for generation and for peers, whose memory only CUDA's counters see.
    """
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        runner.forward_backward()
        runner.forget()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        if runner.variant.keeps_memory:
            reserved, given_out = private_pools()
            peak += reserved - given_out
        return int(peak)
    if case.kind == GENERATE or not (runner.variant.own or runner.name == "peft"):
        return None

    def step() -> None:
        runner.forward_backward()
        runner.forget()

    return profiled_peak_bytes(step)


def private_pools() -> tuple[int, int]:
    """Bytes of all private pools, and how many of them are given out now."""
    private = [
        segment
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment.get("segment_pool_id", _DEFAULT_POOL)) != _DEFAULT_POOL
    ]
    return (
        sum(segment["total_size"] for segment in private),
        sum(segment["allocated_size"] for segment in private),
    )


def capacity() -> int:
    """Bytes of the GPU."""
    return int(torch.cuda.get_device_properties(0).total_memory)
