"""The back ends that the tests of an op run over."""

import pytest
import torch

from softprompt.ops.library import availability

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def backend_parameter(name):
    """A parameter that is skipped, with the reason, where the back end cannot run here."""
    found = availability(name, DEVICE)
    return pytest.param(name, marks=[] if found.usable else pytest.mark.skip(reason=found.reason))


BACKENDS = [backend_parameter(name) for name in ("reference", "triton", "native")]
