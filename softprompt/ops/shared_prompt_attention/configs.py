"""Launch configurations of the Triton kernels, by the class of the shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

KINDS = ("forward", "query", "key", "prompt")
LARGEST_HEAD_DIM = 256
_SMALLEST_DOT = 16


@dataclass(frozen=True)
class LaunchConfig:
    """Blocks of one kernel: rows of queries, rows of keys, and how it is launched."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def padded_dim(width: int) -> int:
    """The power of two that a head dim is padded to inside a kernel; products need 16."""
    return max(_SMALLEST_DOT, 1 << (width - 1).bit_length())


# (kernel, largest padded head dim, itemsize of at most) -> configuration. Chosen from what the compiler
# reports (benchmarks/results/compile): no kernel spills more than four registers, most spill none, and shared
# memory stays below 99 KiB, so that every GPU since sm_80 runs them; blocks of 64 queries, because the texts
# of prompt tuning are short. A product gives each warp 16 rows at least: more warps than that, one below the
# other, compute the same rows again.
_TABLE: dict[tuple[str, int, int], LaunchConfig] = {
    ("forward", 64, 2): LaunchConfig(64, 64, 4, 2),
    ("forward", 128, 2): LaunchConfig(64, 64, 8, 2),
    ("forward", 256, 2): LaunchConfig(64, 32, 8, 2),
    ("query", 64, 2): LaunchConfig(64, 32, 4, 2),
    ("query", 128, 2): LaunchConfig(64, 32, 8, 2),
    ("query", 256, 2): LaunchConfig(32, 32, 8, 1),
    ("key", 64, 2): LaunchConfig(32, 64, 4, 2),
    ("key", 128, 2): LaunchConfig(32, 64, 8, 1),
    ("key", 256, 2): LaunchConfig(32, 32, 8, 1),
    ("prompt", 64, 2): LaunchConfig(32, 64, 4, 2),
    ("prompt", 128, 2): LaunchConfig(32, 64, 8, 2),
    ("prompt", 256, 2): LaunchConfig(32, 32, 8, 1),
    ("forward", 64, 8): LaunchConfig(32, 16, 4, 2),
    ("forward", 128, 8): LaunchConfig(32, 32, 8, 1),
    ("forward", 256, 8): LaunchConfig(16, 16, 8, 1),
    ("query", 64, 8): LaunchConfig(32, 32, 8, 1),
    ("query", 128, 8): LaunchConfig(16, 16, 8, 1),
    ("query", 256, 8): LaunchConfig(16, 16, 8, 1),
    ("key", 64, 8): LaunchConfig(16, 32, 4, 1),
    ("key", 128, 8): LaunchConfig(16, 16, 8, 1),
    ("key", 256, 8): LaunchConfig(16, 16, 8, 1),
    ("prompt", 64, 8): LaunchConfig(16, 32, 8, 1),
    ("prompt", 128, 8): LaunchConfig(16, 16, 8, 1),
    ("prompt", 256, 8): LaunchConfig(16, 16, 8, 1),
}
# What differs, by kernel, padded head dim and the major compute capability, for entries of 2 bytes. On sm_90
# 4 warps make a product of 64 rows together, and both groups of 8 warps would compute the scores of the same
# 64 rows. On sm_80 warps stand side by side where the head dim is 128, and 4 of them would spill, as would
# the larger tiles of a head dim of 64. The forward of a head dim of 256 keeps its 8 warps on sm_90: the
# registers of 4 do not hold an accumulator of 64 rows. On sm_100 the compiler gives 8 warps too few of them.
_OTHER: dict[tuple[str, int, int], LaunchConfig] = {
    ("forward", 64, 8): LaunchConfig(64, 32, 4, 2),
    ("key", 64, 8): LaunchConfig(16, 64, 4, 2),
    ("forward", 128, 9): LaunchConfig(128, 64, 8, 2),
    ("query", 128, 9): LaunchConfig(64, 32, 4, 2),
    ("key", 128, 9): LaunchConfig(32, 128, 8, 1),
    ("prompt", 128, 9): LaunchConfig(32, 64, 4, 2),
    ("key", 128, 10): LaunchConfig(32, 64, 4, 1),
}
_OVERRIDE: dict[str, LaunchConfig] = {}


@cache
def architecture(device: torch.device) -> int:
    """Compute capability of a CUDA device in one number, as in sm_90; 0 for others."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch_config(kind: str, head_dim: int, itemsize: int, arch: int) -> LaunchConfig:
    """The configuration of a kernel.

    Args:
        kind: "forward", "query" (d(query)), "key" (d(key), d(value) of a token's own text) or "prompt" (those
            of the prompts, from all texts).
        head_dim: the larger of D and Dv.
        itemsize: bytes of an entry.
        arch: of the GPU; see `architecture`.
    """
    if kind in _OVERRIDE:
        return _OVERRIDE[kind]
    width = next(limit for limit in (64, 128, 256) if head_dim <= limit)
    chosen = _TABLE[(kind, width, 2 if itemsize <= 2 else 8)]
    return _OTHER.get((kind, width, arch // 10), chosen) if itemsize <= 2 else chosen


def launch_configs(kind: str, head_dim: int, itemsize: int, arch: int) -> list[LaunchConfig]:
    """Candidates for a sweep on a device, the table's own choice first."""
    chosen = launch_config(kind, head_dim, itemsize, arch)
    blocks = (16, 32) if itemsize > 2 else (32, 64, 128)
    others = [
        LaunchConfig(queries, keys, warps, stages)
        for queries in blocks
        for keys in blocks
        for warps in (4, 8)
        for stages in (1, 2, 3)
        if queries * keys <= 8192 and (queries + keys) * head_dim * itemsize * stages <= 200 * 1024
    ]
    return [chosen, *(config for config in others if config != chosen)]


@contextlib.contextmanager
def launched_with(**configs: LaunchConfig) -> Iterator[None]:
    """Uses other configurations inside the block, by kind; for sweeps and tests."""
    unknown = sorted(set(configs) - set(KINDS))
    if unknown:
        raise ValueError(f"expected kinds of {', '.join(KINDS)}, got {', '.join(unknown)}")
    before = dict(_OVERRIDE)
    _OVERRIDE.update(configs)
    try:
        yield
    finally:
        _OVERRIDE.clear()
        _OVERRIDE.update(before)
