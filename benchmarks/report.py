"""From the newest records to the README: tables between two markers, and pictures beside the records."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.charts import draw_memory, draw_times
from benchmarks.variants import REFERENCE

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
NOT_MEASURED = "not measured"
FAILED = "check failed"
OWN = "softprompt"
_EXPLANATION = (
    "x PEFT: median over interleaved rounds of PEFT's step time / the variant's. Token limit: how many "
    "times fewer FLOP the linear layers have without repeated prompts, pads and unlabelled head rows; "
    "attention, vector operations and PEFT's work on its logits are not in it, so more than 1 of the "
    "limit is possible. Floor: max(FLOP / peak, bytes of the weights / bandwidth), both measured in the"
    " same run. Peak memory: bytes of torch's allocator in one forward and backward."
)

Record = dict[str, Any]


class ReportError(RuntimeError):
    """The README cannot take the tables."""


@dataclass(frozen=True)
class Measured:
    """The newest measurement of one case on one device."""

    case: Record
    record: Record

    @property
    def variants(self) -> dict[str, Record]:
        """By name; PEFT is among them."""
        return {variant["name"]: variant for variant in self.case["variants"]}


def report(results: Path, readme: Path) -> list[Path]:
    """Writes the tables into the README and the pictures beside the records.

    Args:
        results: folder with one folder of records a device.
        readme: file with the two markers; what stands between them is replaced.

    Returns:
        The files written.

    Raises:
        ReportError: the file or the markers are missing.
    """
    if not readme.is_file():
        raise ReportError(f"{readme} is not there")
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ReportError(
            f"{readme} must have one {BEGIN} and after it one {END}: the tables go between them"
        )
    written, sections = [], []
    for folder in sorted(path for path in results.glob("*") if any(path.glob("*.json"))):
        newest = newest_by_case(
            json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")
        )
        pictures = draw_times(newest, folder / "time.png"), draw_memory(newest, folder / "memory.png")
        drawn = [path for path in pictures if path is not None]
        written += drawn
        links = [Path(os.path.relpath(path, readme.parent)).as_posix() for path in drawn]
        sections.append(_section(newest, links))
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    body = "\n\n".join(sections) or "Not measured yet."
    partial = readme.with_name(f".{readme.name}.partial")
    partial.write_text(f"{head}{BEGIN}\n{body}\n{END}{tail}", encoding="utf-8")
    os.replace(partial, readme)
    return [*written, readme]


def newest_by_case(records: Iterable[Record]) -> list[Measured]:
    """Every case that was measured, each from the newest record that has it, in the order of `CASES`."""
    newest: dict[str, Measured] = {}
    for record in sorted(records, key=lambda record: record["date"]):
        for case in record["cases"]:
            newest[case["name"]] = Measured(case, record)
    order = list(CASES)
    return sorted(
        newest.values(), key=lambda m: order.index(m.case["name"]) if m.case["name"] in order else len(order)
    )


def _section(newest: Sequence[Measured], pictures: Sequence[str]) -> str:
    device = newest[0].record["device"]
    tiny = newest[0].record["tiny"]
    known = [] if tiny else [name for name, case in CASES.items() if case.device == device["kind"]]
    measured = {found.case["name"]: found for found in newest}
    names = list(dict.fromkeys([*known, *measured]))
    cores = f", {device['cores']} cores" if "cores" in device else ""
    parts = [
        f"### {'Toy sizes on ' if tiny else ''}{device['kind'].upper()}: {device['name']}{cores}",
        *(f"![{Path(link).stem} of a step]({link})" for link in pictures),
        _table(
            (
                "case",
                "variant",
                "step: median (p20 to p80)",
                "x PEFT",
                "token limit",
                "of the limit",
                "x floor",
            ),
            (row for name in names for row in _time_rows(name, measured.get(name))),
        ),
        _table(
            (
                "case",
                "variant",
                "peak memory above the weights",
                "of PEFT",
                "loss off by",
                "prompt gradient off by",
            ),
            (row for name in names for row in _memory_rows(name, measured.get(name))),
        ),
        _legend(newest),
    ]
    return "\n\n".join(parts)


def _time_rows(name: str, found: Measured | None) -> list[tuple[str, ...]]:
    if found is None:
        return [(name, *[NOT_MEASURED] * 6)]
    rows: list[tuple[str, ...]] = []
    for variant in found.case["variants"]:
        time = variant["time"]
        if time is None:
            rows.append((name, variant["name"], FAILED, *["-"] * 4))
            continue
        step = f"{milliseconds(time['p50'])} ms ({milliseconds(time['p20'])} to {milliseconds(time['p80'])})"
        of_floor = f"{time['p50'] / found.case['floor_seconds']:.2f}"
        if variant["name"] == REFERENCE.name:
            rows.append((name, variant["name"], step, "1", "-", "-", of_floor))
            continue
        limit = found.case["token_limit"]
        share = time["ratio"] / limit
        target = found.case["targets"]["share_of_limit"] if variant["name"] == OWN else None
        verdict = "" if target is None else _verdict(share >= target, f">= {target}")
        rows.append(
            (
                name,
                variant["name"],
                step,
                f"**{time['ratio']:.2f}**",
                f"{limit:.2f}",
                f"{share:.2f}{verdict}",
                of_floor,
            )
        )
    return rows


def _memory_rows(name: str, found: Measured | None) -> list[tuple[str, ...]]:
    if found is None:
        return [(name, *[NOT_MEASURED] * 5)]
    rows: list[tuple[str, ...]] = []
    reference = found.variants[REFERENCE.name]["peak_bytes"]
    for variant in found.case["variants"]:
        check, peak = variant["check"], variant["peak_bytes"]
        errors = tuple(_error(check[key]) for key in ("loss_difference", "gradient_error"))
        if peak is None:
            rows.append((name, variant["name"], FAILED, "-", *errors))
        elif variant["name"] == REFERENCE.name:
            rows.append((name, variant["name"], megabytes(peak), "1", "-", "-"))
        else:
            share = peak / reference
            target = found.case["targets"]["share_of_memory"] if variant["name"] == OWN else None
            verdict = "" if target is None else _verdict(share <= target, f"<= {target}")
            rows.append((name, variant["name"], megabytes(peak), f"{share:.3f}{verdict}", *errors))
    return rows


def _legend(newest: Sequence[Measured]) -> str:
    lines = []
    for found in newest:
        case, record = found.case, found.record
        batch, versions, device = case["batch"], record["versions"], record["device"]
        packages = ", ".join(
            f"{name} {version}" for name, version in versions.items() if name != "softprompt"
        )
        threads = f", {device['threads']} threads" if "threads" in device else ""
        ceilings = case["ceilings"]
        lines.append(
            f"- {case['name']}: {case['why']}. {case['shape']['name']}, {case['dtype']}, random weights; "
            f"{case['rows']} rows of {batch['padded_length']} with {sum(batch['lengths'])} text tokens "
            f"({batch['length_source']}) and {batch['labels']} labels, P = {case['num_virtual_tokens']}; "
            f"{case['rounds']} rounds. {record['date'][:10]}, commit {record['commit']}, {packages}"
            f"{threads}; {ceilings['flop_per_second'] / 1e9:,.0f} GFLOP/s and "
            f"{ceilings['bytes_per_second'] / 1e9:,.0f} GB/s."
        )
    lines += ["", _EXPLANATION]
    return "\n".join(lines)


def _verdict(met: bool, target: str) -> str:
    return f" ({'met' if met else 'missed'}: {target})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def milliseconds(seconds: float) -> str:
    """Three digits or more, without the unit."""
    return f"{1e3 * seconds:,.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f}"


def megabytes(count: float) -> str:
    """Three digits or more, with the unit."""
    return f"{count / 1e6:,.{0 if count >= 1e8 else 1 if count >= 1e6 else 3}f} MB"
