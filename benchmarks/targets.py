"""What was asked, what was measured, and whether it was met."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.variants import REFERENCE

Record = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """One target of one case."""

    case: str
    what: str
    wanted: float
    at_least: bool
    measured: float | None
    of: str = ""  # the variant that it was measured on

    @property
    def verdict(self) -> str:
        """met, missed or not measured."""
        if self.measured is None:
            return "not measured"
        met = self.measured >= self.wanted if self.at_least else self.measured <= self.wanted
        return "met" if met else "missed"

    @property
    def limit(self) -> str:
        """With its direction."""
        return f"{'>=' if self.at_least else '<='} {self.wanted:.3g}"


def best(variants: Iterable[Record], *, own: bool) -> Record | None:
    """The fastest of softprompt's variants, or of the others; None where none was timed."""
    timed = [variant for variant in variants if is_own(variant) == own and variant["time"] is not None]
    return min(timed, key=relative, default=None)


def is_own(variant: Record) -> bool:
    """Whether a record's variant is softprompt."""
    return bool(variant.get("own", variant["name"] == "softprompt"))


def relative(variant: Record) -> float:
    """Time in units of the case's reference, by the ratio where there is one."""
    time = variant["time"]
    return 1 / time["ratio"] if "ratio" in time else float(time["p50"])


def by_name(case: Record) -> dict[str, Record]:
    """The variants of a case."""
    return {variant["name"]: variant for variant in case.get("variants", ())}


def goals_of_case(case: Record, targets: Record) -> list[Goal]:
    """The goals of a step case.

    Args:
        case: its record; {"name": ...} where it was not measured.
        targets: fields of `cases.Targets`.
    """
    variants = by_name(case)
    ours, peer = best(variants.values(), own=True), best(variants.values(), own=False)
    theirs = variants.get(REFERENCE.name)
    found: dict[str, float | None] = dict.fromkeys(targets)
    if ours is not None:
        against_peft = case.get("ratio_to", REFERENCE.name) == REFERENCE.name and "ratio" in ours["time"]
        ratio = ours["time"]["ratio"] if against_peft else None
        floor = case.get("floor_seconds")
        found |= {
            "vs_peft": ratio,
            "share_of_limit": None if ratio is None else ratio / case["token_limit"],
            "over_floor": None if not floor else ours["time"]["p50"] / floor,
            "vs_best_peer": None if peer is None else relative(peer) / relative(ours),
        }
        if theirs is not None and theirs["peak_bytes"] and ours["peak_bytes"] is not None:
            found["share_of_memory"] = ours["peak_bytes"] / theirs["peak_bytes"]
        if ours.get("prefill"):
            found["prefill_vs_peft"] = ours["prefill"].get("ratio")
    name = ours["name"] if ours is not None else ""
    return [
        Goal(case["name"], what, wanted, at_least, found.get(key), name)
        for key, (what, at_least) in _STEP_GOALS.items()
        if (wanted := targets.get(key)) is not None
    ]


_STEP_GOALS = {
    "vs_peft": ("x PEFT", True),
    "vs_best_peer": ("x the fastest other variant", True),
    "share_of_limit": ("share of the token limit", True),
    "over_floor": ("step / floor", False),
    "share_of_memory": ("peak memory / PEFT's", False),
    "prefill_vs_peft": ("prefill x PEFT", True),
}


def goals_of_kernel(case: Record, targets: Record) -> list[Goal]:
    """The goals of a kernel case."""
    variants = by_name(case)
    ours = best(variants.values(), own=True)
    goals = []
    time = None if ours is None else ours["time"]["p50"]
    name = "" if ours is None else ours["name"]
    if targets["over_floor"] is not None:
        floor = case.get("floor_seconds")
        measured = None if time is None or not floor else time / floor
        goals.append(Goal(case["name"], "time / floor", targets["over_floor"], False, measured, name))
    if targets["microseconds"] is not None:
        measured = None if time is None else 1e6 * time
        goals.append(Goal(case["name"], "microseconds", targets["microseconds"], False, measured, name))
    for other, wanted in targets["vs"]:
        rivals = [
            variant["time"]["p50"]
            for variant in variants.values()
            if variant["time"] is not None
            and (other == variant["name"] or (other == "every peer" and not is_own(variant)))
        ]
        measured = None if time is None or not rivals else min(rivals) / time
        goals.append(Goal(case["name"], f"x {other}", wanted, True, measured, name))
    return goals
