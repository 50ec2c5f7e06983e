"""The back ends that the tests of an op run over."""

import pytest
import torch

from softprompt.ops.registry import availability

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def backend_parameter(name, only_on=None):
    """A parameter that is skipped, with the reason, where the back end cannot run here.

    The compiled CUDA ops have no other tests than these: on a GPU they belong to `pytest -m gpu`.
    """
    if only_on not in (None, DEVICE):
        return pytest.param(
            name, marks=pytest.mark.skip(reason=f"{name} is there for {only_on} tensors only")
        )
    found = availability(name, DEVICE)
    marks = [] if found.usable else [pytest.mark.skip(reason=found.reason)]
    if name == "native" and DEVICE == "cuda":
        marks.append(pytest.mark.gpu)
    return pytest.param(name, marks=marks)


BACKENDS = [backend_parameter(name) for name in ("reference", "triton", "native")]
