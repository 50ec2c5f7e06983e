"""A table of at most 30 lines: what is worth reading at the end of a GPU pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.cases import CASES
from benchmarks.records import Measured, newest_by_case
from benchmarks.tables import microseconds, milliseconds
from benchmarks.targets import Goal, best, goals_of_case, goals_of_kernel
from benchmarks.variants import REFERENCE

MOST_LINES = 30

Record = dict[str, Any]


def short_table(records: Iterable[Record]) -> str:
    """The newest of every case in these records, a line each; cases of one head or attention share one."""
    records = list(records)
    steps = newest_by_case(records, "cases")
    kernels = newest_by_case(records, "kernels")
    lines = []
    if steps:
        lines.append(
            _line("case", "PEFT ms", "best other ms", "ours ms", "xPEFT", "xbest", "xfloor", "missed")
        )
        lines += [_step_line(found) for found in steps]
    if kernels:
        lines.append(_line("kernel", "floor us", "best other us", "ours us", "", "xbest", "xfloor", "missed"))
        lines += [_kernel_line(found) for found in _worst_of_groups(kernels)]
    faults = [
        f"CHECK FAILED {found.name}: {variant['name']}"
        for found in (*steps, *kernels)
        for variant in found.case["variants"]
        if (variant.get("check") is not None and not variant["check"]["passed"])
        or (variant.get("errors") is not None and not variant["passed"])
    ]
    if len(lines) + len(faults) > MOST_LINES:
        kept = max(0, MOST_LINES - len(lines) - 1)
        faults = [*faults[:kept], f"... and {len(faults) - kept} more failed checks"]
    return "\n".join([*lines, *faults][:MOST_LINES])


def _line(*cells: str) -> str:
    name, *numbers, last = cells
    return f"{name:<30}" + "".join(f"{cell:>14}" for cell in numbers) + f"  {last}"


def _step_line(found: Measured) -> str:
    case, variants = found.case, found.variants
    if case.get("reason"):
        return f"{found.name:<30}  not run: {case['reason'][:80]}"
    targets = asdict(CASES[found.name].targets) if found.name in CASES else case["targets"]
    everything = {goal.what: goal for goal in goals_of_case(case, dict.fromkeys(targets, 0.0))}
    ours = best(variants.values(), own=True)
    peer = best((v for v in variants.values() if v["name"] != REFERENCE.name), own=False)
    return _line(
        found.name,
        _milliseconds(variants.get(REFERENCE.name)),
        _milliseconds(peer),
        _milliseconds(ours),
        _value(everything, "x PEFT"),
        _value(everything, "x the fastest other variant"),
        _value(everything, "step / floor"),
        _missed(goals_of_case(case, case["targets"])),
    )


def _kernel_line(found: Measured) -> str:
    case = found.case
    if case["reason"]:
        return f"{found.name:<30}  not run: {case['reason'][:80]}"
    ours, peer = best(case["variants"], own=True), best(case["variants"], own=False)
    times = [None if variant is None else variant["time"]["p50"] for variant in (ours, peer)]
    return _line(
        found.name,
        microseconds(case["floor_seconds"]),
        "-" if times[1] is None else microseconds(times[1]),
        "-" if times[0] is None else microseconds(times[0]),
        "",
        "-" if None in times else f"{times[1] / times[0]:.2f}",
        "-" if times[0] is None else f"{times[0] / case['floor_seconds']:.2f}",
        _missed(goals_of_kernel(case, case["targets"])),
    )


def _worst_of_groups(kernels: Sequence[Measured]) -> list[Measured]:
    """The farthest from its floor of a head, an attention, the layouts, padded batches or elementwise ops."""
    worst: dict[str, Measured] = {}
    for found in kernels:
        group = found.name
        if group.startswith(("head-", "attention-", "layout-", "prepend-")):
            group = group.rpartition("-")[0]
        elif group.startswith(("norm-", "glu-", "rotary-")):
            group = "elementwise"
        if group not in worst or _over_floor(found) > _over_floor(worst[group]):
            worst[group] = found
    return list(worst.values())


def _over_floor(found: Measured) -> float:
    ours = best(found.case["variants"], own=True)
    return ours["time"]["p50"] / found.case["floor_seconds"] if ours else 0.0


def _milliseconds(variant: Record | None) -> str:
    if variant is None or variant["time"] is None:
        return "-"
    return milliseconds(variant["time"]["p50"])


def _value(goals: dict[str, Goal], what: str) -> str:
    goal = goals.get(what)
    return "-" if goal is None or goal.measured is None else f"{goal.measured:.2f}"


def _missed(goals: Sequence[Goal]) -> str:
    missed = [f"{goal.what} {goal.limit}" for goal in goals if goal.verdict == "missed"]
    return "; ".join(missed)[:70] or "-"
