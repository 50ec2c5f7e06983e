"""How long a kernel takes: on a GPU without the time of launching it, on a CPU by the clock.

A call of less than a millisecond is recorded, many times over, as one CUDA graph, whose replays are timed
with events. A longer one, and one that cannot be recorded, is called several times between two events: its
launches are asynchronous, so they count only where they take longer than the work. The inputs stay the same,
so that small ones are read from the cache.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from softprompt.engine.cuda_graph import RecordingError, capture

_GRAPH_SECONDS = 1e-3  # of a call that is recorded, at most
_SAMPLE_SECONDS = 2e-3  # of one sample, at least
_MOST_CALLS = 64
WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Timed:
    """One sample of a function."""

    sample: Callable[[], float]  # seconds of one call
    how: str


def timed(function: Callable[[], object], device: str) -> Timed:
    """Prepares the timing of a function that was called before."""
    if device != "cuda":
        return Timed(lambda: _by_clock(function), "clock")
    estimate = _by_events(function, 2)
    calls = max(1, min(_MOST_CALLS, round(_SAMPLE_SECONDS / max(estimate, 1e-6))))
    if estimate <= _GRAPH_SECONDS:
        graph, obstacle = _recorded(function, calls)
        if graph is not None:
            return Timed(lambda: _by_events(graph.replay, 1) / calls, f"graph of {calls} calls")
        return Timed(lambda: _by_events(function, calls), f"events, {calls} calls ({obstacle})")
    return Timed(lambda: _by_events(function, calls), f"events, {calls} calls")


def _by_clock(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _by_events(function: Callable[[], object], calls: int) -> float:
    """Seconds of a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


def _waits(function: Callable[[], object]) -> bool:
    """Whether a call makes the host wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return any("synchronizing CUDA operation" in str(warning.message) for warning in said)


def _recorded(function: Callable[[], object], calls: int) -> tuple[torch.cuda.CUDAGraph | None, str]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            function()
        waits = _waits(function)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    if waits:
        # A wait breaks a capture, and a broken capture leaves the allocator in a bad state.
        return None, "it waits for the device"
    graph = torch.cuda.CUDAGraph()
    try:
        with capture(graph, side.device, side):
            for _ in range(calls):
                function()
    except RecordingError as error:
        torch.cuda.synchronize()
        return None, f"not recordable: {str(error)[:80]}"
    graph.replay()
    torch.cuda.synchronize()
    return graph, ""
