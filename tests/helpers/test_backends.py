"""The parameters of the tests of the ops."""

import backends
import pytest


@pytest.mark.parametrize("device, expected", [("cuda", True), ("cpu", False)])
def test_the_compiled_ops_are_tested_by_the_gpu_pass_where_there_is_a_gpu(device, expected, monkeypatch):
    monkeypatch.setattr(backends, "DEVICE", device)
    marks = {mark.name for mark in backends.backend_parameter("native").marks}
    assert ("gpu" in marks) == expected
