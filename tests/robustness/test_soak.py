"""A short form of soak.py: after some steps in changing shapes nothing grows any more."""

import pytest
from marks import slow_unless
from robustness.soak import soak

STEPS, WARM = 56, 36


PROGRAMS = ["training", "generate", "adapters that come and go"]


@pytest.mark.parametrize("name", slow_unless(["training"], PROGRAMS))
def test_steps_in_changing_shapes_leave_nothing_behind(name):
    found = soak(name, STEPS, WARM)
    grown = found["grown"]
    assert grown["tensors"] <= 0, found
    # An adapter that stays has many more objects; caches of other libraries grow now and then.
    assert grown["objects"] < 3 * (STEPS - WARM), found
    assert all(grown[cache] <= 0 for cache in ("states", "records")), found
