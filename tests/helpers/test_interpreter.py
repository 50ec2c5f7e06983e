"""Kernels in Triton's interpreter, with the language made theirs once for each launch."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton compiles here", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter


@triton.jit
def _twice(value):
    return value + value


@triton.jit
def _four_times(source_ptr, out_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(out_ptr + places, _twice(_twice(tl.load(source_ptr + places))))


@triton.jit
def _refused(source_ptr):
    tl.static_assert(_twice(1) == 3)


def test_a_launch_replaces_the_language_once_and_gives_it_back(monkeypatch):
    counted, replace = [], interpreter._patch_attr

    def count(package, name, *rest):
        counted.append((package, name))
        replace(package, name, *rest)

    monkeypatch.setattr(interpreter, "_patch_attr", count)
    source, out, load = torch.arange(8.0), torch.empty(8), tl.load
    for _ in range(2):
        _four_times[(1,)](source, out, SIZE=8)
        assert torch.equal(out, 4 * source)
        assert counted.count((tl, "load")) == 1
        counted.clear()
        assert tl.load is load
    with pytest.raises(interpreter.InterpreterError):
        _refused[(1,)](source)
    assert tl.load is load
