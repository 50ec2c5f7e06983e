"""The newest measurement of every case, out of the folders of records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES

Record = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """The newest measurement of one case on one device."""

    case: Record
    record: Record

    @property
    def name(self) -> str:
        """Of the case."""
        return str(self.case["name"])

    @property
    def variants(self) -> dict[str, Record]:
        """By name."""
        return {variant["name"]: variant for variant in self.case["variants"]}


@dataclass(frozen=True)
class Device:
    """What was measured on one device."""

    folder: Path  # where its newest records lie, and its pictures go
    described: Record
    tiny: bool
    steps: list[Measured]
    kernels: list[Measured]

    @property
    def kind(self) -> str:
        """Cpu or cuda."""
        return str(self.described["kind"])

    @property
    def title(self) -> str:
        """For a heading."""
        cores = f", {self.described['cores']} cores" if "cores" in self.described else ""
        label = "GPU" if self.kind == "cuda" else "CPU"
        return f"{'Toy sizes on ' if self.tiny else ''}{label}: {self.described['name']}{cores}"


def records_since(results: Path, date: str) -> list[Record]:
    """The records of steps and kernels of a folder that were begun at a date (ISO) or later."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*/*.json"))]
    return [record for record in records if is_record(record) and record["date"] >= date]


def is_record(record: Any) -> bool:
    """Whether a JSON file is a record of steps or kernels."""
    return isinstance(record, dict) and "device" in record and ("cases" in record or "kernels" in record)


def read_devices(results: Sequence[Path]) -> list[Device]:
    """All devices with records, in the order of their folders' names; other JSON files are passed over."""
    folders: dict[str, list[tuple[Path, Record]]] = {}
    for root in results:
        for path in sorted(root.glob("*/*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            if is_record(record):
                folders.setdefault(path.parent.name, []).append((path.parent, record))
    devices = []
    for _, found in sorted(folders.items()):
        records = [record for _, record in found]
        newest = max(found, key=lambda pair: pair[1]["date"])
        devices.append(
            Device(
                newest[0],
                newest[1]["device"],
                newest[1]["tiny"],
                newest_by_case(records, "cases"),
                newest_by_case(records, "kernels"),
            )
        )
    return devices


def newest_by_case(records: Iterable[Record], kind: str = "cases") -> list[Measured]:
    """Every case that was measured, each from the newest record that has it, in the order of declaration."""
    newest: dict[str, Measured] = {}
    for record in sorted(records, key=lambda record: record["date"]):
        for case in record.get(kind, ()):
            newest[case["name"]] = Measured(case, record)
    order = list(CASES) if kind == "cases" else list(_kernel_names())
    return sorted(
        newest.values(), key=lambda found: order.index(found.name) if found.name in order else len(order)
    )


def _kernel_names() -> Iterable[str]:
    from benchmarks.kernels.cases import KERNEL_CASES

    return KERNEL_CASES
