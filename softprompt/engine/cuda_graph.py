"""How a step is recorded once and run again: as a CUDA graph or, where there is none, by running it again."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

Run = Callable[[], None]


class RecordingError(RuntimeError):
    """A step cannot be recorded; says why."""


class Recorder(Protocol):
    """Records callables of one kind of device. They read and write tensors that stay where they are."""

    # Whether running it again runs its Python, which looks at a model that may have changed since.
    runs_python: bool

    def record(self, run: Run, device: torch.device) -> Run:
        """Runs `run` at least once and returns what runs the same operations again.

        Raises:
            RecordingError: it cannot be recorded.
        """
        ...

    def turn(self, device: torch.device) -> AbstractContextManager[None]:
        """Around whatever records, fills what a recorded run reads, runs it again or reads its results."""
        ...


class CudaGraphRecorder:
    """One CUDA graph for each callable.

    All graphs of a device share one memory pool: what they compute in between lies in the same place, so
    their number costs little memory. That is right as long as nothing of a run outlives it but what it
    copies into tensors from outside the pool, and as long as two graphs never run at the same time: see
    `turn`.
    """

    runs_python = False

    def __init__(self) -> None:
        self._pools: dict[torch.device, Any] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last_turn: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}
        self._graphs: dict[torch.device, weakref.WeakSet[torch.cuda.CUDAGraph]] = {}

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """See `Recorder`. Begins on the device when the turn before has ended, on whatever stream that was.

        Not around the replay alone: the copies into and out of the tensors that steps share belong to it.
        """
        stream = torch.cuda.current_stream(device)
        last = self._last_turn.get(device)
        if last is not None and last[0] != stream:
            stream.wait_event(last[1])
            last = None
        try:
            yield
        finally:
            event = torch.cuda.Event() if last is None else last[1]
            event.record(stream)
            self._last_turn[device] = (stream, event)

    def pools(self) -> frozenset[Any]:
        """Ids of the memory pools, as `torch.cuda.memory_snapshot` has them."""
        return frozenset(self._pools.values())

    def record(self, run: Run, device: torch.device) -> Run:
        """See `Recorder`. The first run compiles what has to be compiled; the second has to be free of waits.

        Looking for waits before the capture keeps a forward that waits from breaking a capture, which leaves
        random generators and the allocator in a bad state.
        """
        with torch.cuda.device(device):
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            graphs = self._graphs.setdefault(device, weakref.WeakSet())
            if not graphs:
                self._pools.pop(device, None)  # the last graph of a pool takes the pool with it
            if device not in self._pools:
                self._pools[device] = torch.cuda.graph_pool_handle()
            current, side = torch.cuda.current_stream(device), self._streams[device]
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    run()
                    _without_waits(run)
            finally:
                # Also where a run failed: the tensors that it still writes to are then freed, and what gets
                # their memory works on this stream.
                current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            gc.collect()  # nothing may be freed in the middle of a capture
            try:
                with capture(graph, device, side, self._pools[device]):
                    run()
            except BaseException:
                del self._pools[device]  # takes no other capture
                raise
            graphs.add(graph)

        def replay() -> None:
            with torch.cuda.device(device):
                graph.replay()

        # The capture itself computes nothing.
        replay()
        return replay


_FAILED: list[torch.cuda.CUDAGraph] = []


@contextlib.contextmanager
def capture(
    graph: torch.cuda.CUDAGraph, device: torch.device, stream: torch.cuda.Stream, pool: Any = None
) -> Iterator[None]:
    """Captures what the block does on `stream` of `device`, in memory of its own or of a pool.

    Raises:
        RecordingError: it cannot be captured. The pool then takes no other capture.
    """
    current = torch.cuda.current_stream(device)
    try:
        # Other threads (data loaders that pin memory) may go on with their own calls.
        with (
            _workspaces_in_the_pool(),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            yield
    except BaseException as error:
        # A capture that was invalidated cannot be ended: its stream is then still the current one, and the
        # allocator keeps a pointer to the graph. One that could be ended (memory ran out) keeps what it has
        # of the pool until it is reset.
        torch.cuda.set_stream(current)
        graph.reset()
        _FAILED.append(graph)
        if not isinstance(error, Exception):
            raise
        raise RecordingError(f"the capture failed: {first_line(error)}") from error


@contextlib.contextmanager
def _workspaces_in_the_pool() -> Iterator[None]:
    """Around a capture: what cuBLAS works in is made anew inside, in the graph's pool, and left there.

    PyTorch keeps one such workspace for each stream. That of the runs before the capture would lie outside of
    the pool, and is freed when something else forgets all of them, as `torch.compile` does where it makes
    CUDA graphs: replays would then write to memory that is others'.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _without_waits(run: Run) -> None:
    """Runs `run`, and raises where it made the host wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        # Not "error", which other threads that wait for the device would meet too.
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [warning for warning in said if "synchronizing CUDA operation" in str(warning.message)]
    if waits:
        place = f"{Path(waits[0].filename).name}, line {waits[0].lineno}"
        raise RecordingError(f"its forward or backward makes the host wait for the device ({place})")


class RerunRecorder:
    """Runs the callable itself again: everything about a step graph but its speed, on any device."""

    runs_python = True

    def record(self, run: Run, device: torch.device) -> Run:
        """See `Recorder`."""
        run()
        return run

    def turn(self, device: torch.device) -> AbstractContextManager[None]:
        """See `Recorder`. Nothing is asynchronous here."""
        return contextlib.nullcontext()


def first_line(error: Exception) -> str:
    """Kind and first line of an exception, for a reason that is one sentence."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


# By the type of the device. Tests and rehearsals add one for the CPU.
RECORDERS: dict[str, Recorder] = {"cuda": CudaGraphRecorder()}
