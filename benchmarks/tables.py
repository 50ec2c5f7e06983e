"""Tables in Markdown: the main ones for the README, all of them for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.cases import CASES
from benchmarks.kernels.cases import KERNEL_CASES
from benchmarks.records import Device, Measured
from benchmarks.targets import Goal, best, goals_of_case, goals_of_kernel, is_own, relative
from benchmarks.variants import REFERENCE
from softprompt.ops.registry import BACKENDS, PREFERRED

NOT_MEASURED = "not measured"
FAILED = "check failed"

Record = dict[str, Any]
Row = tuple[str, ...]


def known_cases(device: Device | None) -> list[str]:
    """The cases of a device's kind; of a GPU where there is none."""
    if device is not None and device.tiny:
        return [found.name for found in device.steps]
    kind = "cuda" if device is None else device.kind
    return [name for name, case in CASES.items() if case.device == kind]


def _of(found: Iterable[Measured]) -> dict[str, Measured]:
    return {one.name: one for one in found}


def _targets(name: str, found: Measured | None) -> Record:
    if found is not None:
        return dict(found.case["targets"])
    return asdict(CASES[name].targets)


def main_table(device: Device) -> str:
    """One row a case: PEFT, the best other, softprompt's best. On a CPU there is no other."""
    measured = _of(device.steps)
    if device.kind == "cpu" and not device.tiny:
        header = ("case", "PEFT", "softprompt", "x PEFT", "of the token limit", "x floor", "memory / PEFT's")
        return table(header, (_cpu_row(name, found) for name, found in measured.items()))
    header = (
        "case",
        "PEFT",
        "fastest other",
        "softprompt",
        "x PEFT",
        "x fastest other",
        "x floor",
        "peak memory / PEFT's",
    )
    return table(header, (_main_row(name, measured.get(name)) for name in known_cases(device)))


def _main_row(name: str, found: Measured | None) -> Row:
    if found is None:
        return (name, *[NOT_MEASURED] * 7)
    case, variants = found.case, found.variants
    if case.get("reason"):
        return (name, f"not run: {case['reason']}", *["-"] * 6)
    ours = best(variants.values(), own=True)
    peer = best((v for v in variants.values() if v["name"] != REFERENCE.name), own=False)
    goals = {
        goal.what: goal
        for goal in goals_of_case(case, dict.fromkeys(_targets(name, None if name in CASES else found), 0.0))
    }

    def value(what: str) -> str:
        goal = goals.get(what)
        return "-" if goal is None or goal.measured is None else f"{goal.measured:.3g}"

    return (
        name,
        _step_cell(variants.get(REFERENCE.name)),
        "-" if peer is None else f"{_step_cell(peer)}, {peer['name']}",
        "-" if ours is None else f"{_step_cell(ours)}, {ours['name']}",
        f"**{value('x PEFT')}**",
        value("x the fastest other variant") if peer is not None else "-",
        value("step / floor"),
        value("peak memory / PEFT's"),
    )


def _cpu_row(name: str, found: Measured) -> Row:
    case = found.case
    ours, theirs = best(found.variants.values(), own=True), found.variants[REFERENCE.name]
    if ours is None or theirs["time"] is None:
        return (name, _step_cell(theirs), FAILED, *["-"] * 4)
    ratio = ours["time"]["ratio"]
    return (
        name,
        _step_cell(theirs),
        _step_cell(ours),
        f"**{ratio:.2f}**",
        f"{ratio / case['token_limit']:.2f}",
        f"{ours['time']['p50'] / case['floor_seconds']:.2f}",
        "-" if not ours["peak_bytes"] else f"{ours['peak_bytes'] / theirs['peak_bytes']:.3f}",
    )


def _step_cell(variant: Record | None) -> str:
    if variant is None:
        return "-"
    if variant["time"] is None:
        return variant.get("reason") or FAILED
    return f"{milliseconds(variant['time']['p50'])} ms"


def step_tables(device: Device | None) -> list[str]:
    """Times, then memory and errors, of all variants."""
    measured = _of(device.steps) if device is not None else {}
    names = known_cases(device)
    return [
        table(
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
        table(
            (
                "case",
                "variant",
                "peak memory above the weights",
                "of PEFT",
                "loss off by",
                "prompt gradient (generate: logits) off by",
            ),
            (row for name in names for row in _memory_rows(name, measured.get(name))),
        ),
    ]


def _time_rows(name: str, found: Measured | None) -> list[Row]:
    if found is None:
        return [(name, *[NOT_MEASURED] * 6)]
    if found.case.get("reason"):
        return [(name, "-", f"not run: {found.case['reason']}", *["-"] * 4)]
    rows: list[Row] = []
    limit, floor = found.case["token_limit"], found.case["floor_seconds"]
    for variant in found.case["variants"]:
        for part, label in (("prefill", ", prefill"), ("time", "")):
            time = variant.get(part)
            if part == "prefill" and time is None:
                continue
            if time is None:
                rows.append((name, variant["name"], variant.get("reason") or FAILED, *["-"] * 4))
                continue
            step = (
                f"{milliseconds(time['p50'])} ms ({milliseconds(time['p20'])} to {milliseconds(time['p80'])})"
            )
            of_floor = "-" if not floor else f"{time['p50'] / floor:.2f}"
            against_peft = found.case.get("ratio_to", REFERENCE.name) == REFERENCE.name
            if variant["name"] == REFERENCE.name:
                rows.append((name, variant["name"] + label, step, "1", "-", "-", of_floor))
                continue
            ratio = time.get("ratio") if against_peft else None
            training = floor is not None and is_own(variant) and ratio is not None
            share = ratio / limit if training else None
            target = found.case["targets"].get("share_of_limit") if share is not None else None
            verdict = "" if target is None else _verdict(share >= target, f">= {target}")
            rows.append(
                (
                    name,
                    variant["name"] + label,
                    step,
                    "-" if ratio is None else f"**{ratio:.2f}**",
                    f"{limit:.2f}" if training else "-",
                    "-" if share is None else f"{share:.2f}{verdict}",
                    of_floor,
                )
            )
    return rows


def _memory_rows(name: str, found: Measured | None) -> list[Row]:
    if found is None:
        return [(name, *[NOT_MEASURED] * 5)]
    rows: list[Row] = []
    reference = (found.variants.get(REFERENCE.name) or {}).get("peak_bytes")
    for variant in found.case["variants"]:
        check, peak = variant["check"], variant["peak_bytes"]
        errors: Row = ("-", "-")
        if check is not None and "logit_error" in check:
            errors = ("-", _error(check["logit_error"]))
        elif check is not None:
            errors = tuple(_error(check[key]) for key in ("loss_difference", "gradient_error"))
        if peak is None:
            why = variant.get("reason") or (NOT_MEASURED if variant["time"] else FAILED)
            rows.append((name, variant["name"], why, "-", *errors))
            continue
        share = None if not reference else peak / reference
        target = found.case["targets"]["share_of_memory"] if is_own(variant) else None
        verdict = "" if target is None or share is None else _verdict(share <= target, f"<= {target:.3g}")
        of_peft = "1" if variant["name"] == REFERENCE.name else "-" if share is None else f"{share:.3f}"
        exact = variant["name"] == REFERENCE.name and found.case["dtype"] == "float32"
        rows.append(
            (
                name,
                variant["name"],
                megabytes(peak),
                f"{of_peft}{verdict}",
                *(("-", "-") if exact else errors),
            )
        )
    return rows


def kernel_table(device: Device | None) -> str:
    """All variants of all kernel cases."""
    measured = _of(device.kernels) if device is not None else {}
    names = list(measured) if device is not None and device.tiny else list(KERNEL_CASES)
    return table(
        ("case", "what", "variant", "median (p20 to p80)", "x floor", "errors"),
        (row for name in names for row in _kernel_rows(name, measured.get(name))),
    )


def _kernel_rows(name: str, found: Measured | None) -> list[Row]:
    if found is None:
        return [(name, KERNEL_CASES[name].about, *[NOT_MEASURED] * 4)]
    case = found.case
    if case["reason"]:
        return [(name, case["about"], "-", f"not run: {case['reason']}", "-", "-")]
    rows: list[Row] = []
    for variant in case["variants"]:
        errors = "-" if variant["errors"] is None else ", ".join(map(_error, variant["errors"]))
        time = variant["time"]
        if time is None:
            why = variant["reason"] or FAILED
            rows.append((name, case["about"], variant["name"], why, "-", errors))
            continue
        took = f"{microseconds(time['p50'])} us ({microseconds(time['p20'])} to {microseconds(time['p80'])})"
        over = f"{time['p50'] / case['floor_seconds']:.2f}" if case["floor_seconds"] else "-"
        rows.append((name, case["about"], variant["name"], took, over, errors))
    return rows


def goals(device: Device | None) -> list[Goal]:
    """All targets of a device's kind, in the order of the cases."""
    steps = _of(device.steps) if device is not None else {}
    found = [
        goal
        for name in known_cases(device)
        for goal in goals_of_case(
            steps[name].case if name in steps else {"name": name}, _targets(name, steps.get(name))
        )
    ]
    if device is not None and device.tiny:
        return found
    kernels = _of(device.kernels) if device is not None else {}
    kind = "cuda" if device is None else device.kind
    for name, case in KERNEL_CASES.items():
        record = kernels[name].case if name in kernels else {"name": name}
        found += goals_of_kernel(record, asdict(case.targets_on(kind)))
    return found


def backend_table(device: Device) -> str:
    """What "auto" takes for each op on this kind of device, and the back end that was the fastest."""
    rows: list[Row] = []
    for case, found in _of(device.kernels).items():
        timed = {
            name: variant["time"]["p50"]
            for name, variant in found.variants.items()
            if name in BACKENDS and is_own(variant) and variant["time"] is not None
        }
        wanted = [backend for backend in PREFERRED[device.kind] if backend in timed]
        if found.case["op"] == "shared_prompt_attention" or not wanted:
            continue
        winner = min(timed, key=timed.__getitem__)
        rows.append((found.case["op"], case, wanted[0], winner, f"{timed[wanted[0]] / timed[winner]:.2f}"))
    return table(("op", "case", "auto takes", "fastest back end", "time of auto / fastest"), sorted(rows))


def goal_table(device: Device | None) -> str:
    """Target, measured, met or missed."""
    return table(
        ("case", "what", "target", "measured", "variant", "verdict"),
        (
            (
                goal.case,
                goal.what,
                goal.limit,
                "-" if goal.measured is None else f"{goal.measured:.3g}",
                goal.of or "-",
                goal.verdict,
            )
            for goal in goals(device)
        ),
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell would end it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines)


def fastest(found: Measured) -> tuple[Record | None, Record | None]:
    """Softprompt's fastest variant, and that of the others."""
    return best(found.variants.values(), own=True), best(found.variants.values(), own=False)


def gain(ours: Record | None, theirs: Record | None) -> float | None:
    """How many times faster."""
    return None if ours is None or theirs is None else relative(theirs) / relative(ours)


def _verdict(met: bool, target: str) -> str:
    return f" ({'met' if met else 'missed'}: {target})"


def _error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def milliseconds(seconds: float) -> str:
    """Three digits or more, without the unit."""
    return f"{1e3 * seconds:,.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f}"


def microseconds(seconds: float) -> str:
    """The same in microseconds."""
    return f"{1e6 * seconds:,.{0 if seconds >= 1e-4 else 1 if seconds >= 1e-5 else 2}f}"


def megabytes(count: float) -> str:
    """Three digits or more, with the unit."""
    return f"{count / 1e6:,.{0 if count >= 1e8 else 1 if count >= 1e6 else 3}f} MB"
