"""Interleaved rounds, percentiles, and the time that is left for a run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.limits import now

WARM_UP_ROUNDS = 2
FEWEST_ROUNDS = 7


def interleaved(
    steps: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    *,
    warm_up: int = WARM_UP_ROUNDS,
    seconds_left: float | None = None,
) -> dict[str, list[float]]:
    """Seconds of each step, A B A B ..., so that whatever else the machine does meets all variants alike.

    Args:
        steps: what to time, by name.
        rounds: timed steps of each.
        device: of the steps.
        warm_up: rounds before the timed ones.
        seconds_left: where given, rounds that no longer fit are left out, but never below FEWEST_ROUNDS.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    began = time.perf_counter()
    for number in range(warm_up + rounds):
        timed = number - warm_up
        if seconds_left is not None and timed >= FEWEST_ROUNDS:
            spent = time.perf_counter() - began
            if spent + spent / number > seconds_left:
                break
        for name, step in steps.items():
            start = now(device)
            step()
            if timed >= 0:
                seconds[name].append(now(device) - start)
    return seconds


def summary(own: list[float], reference: list[float] | None = None) -> dict[str, Any]:
    """Percentiles, and how many times faster than the reference: by round, and by the medians."""
    found: dict[str, Any] = {
        "seconds": own,
        "p20": percentile(own, 0.2),
        "p50": percentile(own, 0.5),
        "p80": percentile(own, 0.8),
    }
    if reference is not None:
        pairs = zip(reference, own, strict=True)
        found["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
        found["ratio_of_medians"] = statistics.median(reference) / statistics.median(own)
    return found


def percentile(values: list[float], share: float) -> float:
    """Linear between the two nearest values."""
    ordered = sorted(values)
    below, part = divmod(share * (len(ordered) - 1), 1)
    low, high = ordered[int(below)], ordered[min(int(below) + 1, len(ordered) - 1)]
    return low + part * (high - low)


class Budget:
    """The seconds of a run. Without a limit everything fits."""

    def __init__(self, seconds: float | None = None) -> None:
        self._limit = seconds
        self._began = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._began

    def left(self, reserved: float = 0.0) -> float | None:
        """Seconds left beside those reserved; None: no limit."""
        return None if self._limit is None else self._limit - self.spent - reserved

    def refuses(self, seconds: float, reserved: float) -> str | None:
        """Why something of so many seconds is not begun, or None."""
        left = self.left(reserved)
        if left is None or seconds <= left:
            return None
        return (
            f"time budget: it needs about {seconds:.0f} s, and {max(left, 0):.0f} s of {self._limit:.0f} s "
            "are left beside what is more important"
        )
