"""The order of streams around captures and replays, with as much of `torch.cuda` as the recorder uses."""

import contextlib
import gc
import types
import weakref

import pytest
import torch

from softprompt.engine import cuda_graph
from softprompt.engine.cuda_graph import CudaGraphRecorder, RecordingError, capture

DEVICE = torch.device("cuda", 0)


class Stream:
    """Knows which work comes before whatever it is given next."""

    def __init__(self, device=None):
        self.before = set()

    def work(self, name):
        self.before.add(name)

    def wait_stream(self, other):
        self.before |= other.before

    def wait_event(self, event):
        self.before |= event.before


class Event:
    def record(self, stream):
        self.before = set(stream.before)


class Graph:
    def reset(self):
        pass


class Cuda:
    """One device. A capture in which something raised cannot be ended, and is left as PyTorch leaves it."""

    Stream, Event, CUDAGraph = Stream, Event, Graph

    def __init__(self):
        self.current, self.pools, self.open_pools = Stream(), 0, set()
        self.capturing = False
        self.workspaces = {}  # of cuBLAS: stream -> the pool that it lies in
        Graph.replay = lambda graph: self.current.work("replay")

    def device(self, device):
        return contextlib.nullcontext()

    def current_stream(self, device):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def graph_pool_handle(self):
        self.pools += 1
        return self.pools

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        before, self.current = self.current, stream
        if pool in self.open_pools:
            raise RuntimeError("already recording to this pool")
        self.capturing = pool
        try:
            yield
        except BaseException as error:
            self.open_pools.add(pool)
            raise RuntimeError("operation failed due to a previous error during capture") from error
        finally:
            self.capturing = False
        self.current = before

    def multiply(self):
        """The pool of the workspace that a product on the current stream uses; made where there is none."""
        return self.workspaces.setdefault(self.current, self.capturing or "no pool")

    def get_sync_debug_mode(self):
        return 0

    def set_sync_debug_mode(self, mode):
        pass


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    fake = types.SimpleNamespace(_cuda_clearCublasWorkspaces=lambda: cuda.workspaces.clear())
    monkeypatch.setattr(cuda_graph, "torch", types.SimpleNamespace(cuda=cuda, _C=fake))
    return cuda


def test_a_capture_that_fails_gives_back_the_stream_and_leaves_the_next_one_a_pool(cuda):
    def run():
        if cuda.capturing:
            raise ValueError("not in a capture")

    recorder, caller = CudaGraphRecorder(), cuda.current
    with pytest.raises(RecordingError, match="the capture failed"):
        recorder.record(run, DEVICE)
    assert cuda.current is caller
    recorder.record(lambda: None, DEVICE)()
    assert cuda.current is caller
    assert "replay" in caller.before


def test_what_a_run_that_fails_has_begun_comes_before_what_its_memory_is_used_for_next(cuda):
    def run():
        cuda.current.work("a write")
        raise ValueError("no reason")

    with pytest.raises(ValueError, match="no reason"):
        CudaGraphRecorder().record(run, DEVICE)
    assert "a write" in cuda.current.before


def test_a_turn_begins_when_the_one_before_has_ended_on_whatever_stream(cuda):
    recorder, streams = CudaGraphRecorder(), [cuda.current, Stream(), Stream()]
    done = set()
    for number, place in enumerate((0, 0, 1, 2, 2, 0, 1)):
        cuda.current = streams[place]
        with recorder.turn(DEVICE):
            assert done <= cuda.current.before
            cuda.current.work(f"copies {number}")
        done.add(f"copies {number}")


def test_a_turn_that_an_exception_ended_has_ended(cuda):
    recorder = CudaGraphRecorder()

    def interrupted():
        with recorder.turn(DEVICE):
            cuda.current.work("a write")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    cuda.current = Stream()
    with recorder.turn(DEVICE):
        assert "a write" in cuda.current.before


def test_what_a_graph_multiplies_in_lies_in_its_pool_and_nothing_else_keeps_it(cuda):
    recorder, used = CudaGraphRecorder(), []
    for _ in range(2):
        recorder.record(lambda: used.append(cuda.multiply()), DEVICE)
        assert used[-1] == cuda.pools
        assert cuda.pools not in cuda.workspaces.values()


def test_the_last_graph_of_a_device_takes_the_pool_of_that_device_alone(cuda):
    other, recorder, pools = torch.device("cuda", 1), CudaGraphRecorder(), []

    def record(device):
        return recorder.record(lambda: pools.append(cuda.capturing), device)

    kept, dropped = record(DEVICE), record(other)
    first = pools[-1]
    del dropped
    again = record(other)
    assert pools[-1] not in (False, first)
    assert kept is not again
    record(DEVICE)
    assert pools[-1] == 1


def test_a_recorder_names_the_pools_that_it_fills(cuda):
    recorder = CudaGraphRecorder()
    assert recorder.pools() == frozenset()
    recorder.record(lambda: None, DEVICE)
    assert recorder.pools() == {cuda.pools}


def test_a_capture_that_fails_keeps_its_graph_and_gives_the_stream_back(cuda):
    """The allocator has a pointer to the graph."""
    caller, graph = cuda.current, Graph()
    with pytest.raises(RecordingError, match="operation failed"), capture(graph, DEVICE, Stream()):
        raise ValueError("not in a capture")
    assert cuda.current is caller
    alive = weakref.ref(graph)
    del graph
    gc.collect()
    assert alive() is not None
