"""Which memory of a GPU a variant is charged with, with as much of `torch.cuda` as is asked for it."""

import types

import pytest

from benchmarks import memory
from benchmarks.cases import CASES
from benchmarks.variants import OURS, PEERS, REFERENCE

MB = 10**6
WORKSPACE = 64 * MB


class Device:
    """Segments of memory by pool: [reserved, given out]. The default pool holds what was given out."""

    def __init__(self):
        self.pools, self.given_out, self.workspaces, self.peak = {}, 0, 0, 0

    def memory_allocated(self):
        return self.given_out + self.workspaces

    def max_memory_allocated(self):
        return self.peak

    def reset_peak_memory_stats(self):
        self.peak = self.memory_allocated()

    def synchronize(self):
        pass

    def forget_workspaces(self):
        self.workspaces = 0

    def memory_snapshot(self):
        return [
            {"segment_pool_id": pool, "total_size": reserved, "allocated_size": given_out}
            for pool, (reserved, given_out) in {(0, 0): (MB, MB), **self.pools}.items()
        ]

    def step(self, size):
        """Uses the workspaces, and `size` bytes on top of what is there."""
        self.workspaces = WORKSPACE
        self.peak = max(self.peak, self.memory_allocated() + size)


@pytest.fixture
def device(monkeypatch):
    device = Device()
    clear = types.SimpleNamespace(_cuda_clearCublasWorkspaces=device.forget_workspaces)
    monkeypatch.setattr(memory, "torch", types.SimpleNamespace(cuda=device, _C=clear))
    own = types.SimpleNamespace(pools=lambda: frozenset({(0, 7)}))
    monkeypatch.setitem(memory.RECORDERS, "cuda", own)
    return device


def peak(device, variant, size, before):
    runner = types.SimpleNamespace(
        variant=variant,
        name=variant.name,
        forward_backward=lambda: device.step(size),
        forget=lambda: None,
    )
    return memory.peak_of(runner, CASES["gpu-article"], before)


def test_every_variant_pays_for_its_own_workspaces(device):
    for _ in range(2):
        before = memory.look_before("cuda", own=False)
        assert peak(device, REFERENCE, 5 * MB, before) == WORKSPACE + 5 * MB


def test_a_recorded_step_is_charged_with_its_pool_and_with_no_other(device):
    _, graph, compiled = OURS
    reduced = next(peer for peer in PEERS if peer.keeps_memory)
    before = memory.look_before("cuda", own=True)
    device.pools[0, 7] = (100 * MB, 0)
    assert peak(device, graph, 0, before) == WORKSPACE + 100 * MB
    before = memory.look_before("cuda", own=False)
    device.pools[0, 8] = (900 * MB, 300 * MB)
    device.given_out += 300 * MB
    assert peak(device, reduced, 0, before) == WORKSPACE + 900 * MB
    before = memory.look_before("cuda", own=True)
    device.pools[0, 7] = (120 * MB, 0)  # both graphs lie in it
    assert peak(device, compiled, 0, before) == WORKSPACE + 120 * MB
