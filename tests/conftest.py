"""Shared by all tests. Triton's interpreter has to be chosen before triton is imported."""

import gc
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # what a worker starts has one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(int(os.environ.get("SOFTPROMPT_TEST_THREADS", "1")))
    if os.environ["TRITON_INTERPRET"] == "1" and find_spec("triton"):
        from interpreter import patch_once_for_each_launch

        patch_once_for_each_launch()
if "SOFTPROMPT_TEST_NATIVE" in os.environ:  # a module that tests/native/native_build.py built
    from softprompt.ops import registry

    module = Path(os.environ["SOFTPROMPT_TEST_NATIVE"])
    sys.path.insert(0, str(module.parent))
    registry._NATIVE_MODULES["cpu"] = module.name.split(".")[0]


@pytest.fixture
def tape(monkeypatch):
    """Lets steps on the CPU be recorded, by something that behaves like a CUDA graph."""
    from tape import TapeRecorder

    from softprompt.engine import cuda_graph

    recorder = TapeRecorder()
    monkeypatch.setitem(cuda_graph.RECORDERS, "cpu", recorder)
    return recorder


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(key=lambda item: -_seconds(item))


def pytest_collection_finish():
    """Packages and collected tests live to the end: no collection of garbage has to look at them again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # else what native extensions hold would be reported as leaked at exit


def _seconds(item):
    """What a slow test says that it takes: the long ones begin, so that the short ones fill up the end."""
    marker = item.get_closest_marker("slow")
    return 0 if marker is None else marker.kwargs.get("seconds", 0)
