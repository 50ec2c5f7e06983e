"""Where the time of a step goes: kernels by name, the GPU's idle time between them, the CPU's operations."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import GENERATE, Case, build_batch, toy
from benchmarks.contest import reason_of
from benchmarks.run import new_record
from benchmarks.runner import make_runner
from benchmarks.variants import Variant

STEPS = 3
_MOST_ROWS = 40
_GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")

Record = dict[str, Any]


def profile_cases(
    cases: Sequence[Case],
    variants: Sequence[Variant],
    *,
    tiny: bool = False,
    say: Callable[[str], None] = print,
    save: Callable[[Record], object] = lambda record: None,
) -> Record:
    """Profiles PEFT and softprompt's variants on these cases, and returns the record.

    Args:
        cases: step cases of one device.
        variants: those of PEFT and softprompt among them are profiled.
        tiny: toy sizes.
        say: takes the profile of each variant, for people.
        save: takes the record after each variant.
    """
    device = toy(cases[0]).device if tiny else cases[0].device
    record = new_record(device, "profile", tiny=tiny) | {"profile": []}
    for declared in cases:
        case = toy(declared) if tiny else declared
        if case.kind == GENERATE:
            raise ValueError(f"{case.name}: only training steps are profiled")
        found: Record = {"case": case.name, "variants": []}
        record["profile"].append(found)
        base = case.shape.build(getattr(torch, case.dtype), case.device)
        batch = build_batch(case)
        for variant in variants:
            if not (variant.own or variant.name == "peft") or case.kind not in variant.kinds:
                continue
            entry: Record = {"name": variant.name, "reason": None}
            try:
                runner = make_runner(variant, base, case, batch)
                for _ in range(variant.warm_up + 1):
                    runner.step()
                entry |= profile_step(runner.step, case.device)
                entry["reason"] = variant.doubt(runner.model)
                del runner
            except Exception as error:  # one variant that fails must not end the run
                entry["reason"] = reason_of(error)
            found["variants"].append(entry)
            save(record)
            say(f"{case.name}: {as_text(entry)}")
        del base
        if case.device == "cuda":
            torch.cuda.empty_cache()
    return record


def profile_step(step: Callable[[], None], device: str) -> Record:
    """Kernels, gaps and CPU operations of a warmed-up step, the mean of STEPS."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = str(Path(folder) / "trace.json")
        profiler.export_chrome_trace(trace)
        events = json.loads(Path(trace).read_text(encoding="utf-8"))["traceEvents"]
    averages = [
        {
            "name": event.key,
            "count": event.count / STEPS,
            "microseconds": event.self_cpu_time_total / STEPS,
        }
        for event in profiler.key_averages()
        if event.self_cpu_time_total > 0
    ]
    averages.sort(key=lambda row: -row["microseconds"])
    return {"gpu": gpu_times(events) if device == "cuda" else None, "cpu": averages[:_MOST_ROWS]}


def gpu_times(events: Sequence[Record]) -> Record:
    """Kernels by name with count and share, and busy and idle time between the first kernel and the last.

    Args:
        events: of a Chrome trace of STEPS steps; times in microseconds.
    """
    kernels = [event for event in events if event.get("cat") in _GPU_CATEGORIES and "dur" in event]
    names: dict[str, list[float]] = {}
    for event in kernels:
        names.setdefault(event["name"], []).append(event["dur"])
    total = sum(sum(times) for times in names.values())
    rows = [
        {
            "name": name,
            "count": len(times) / STEPS,
            "microseconds": sum(times) / STEPS,
            "share": sum(times) / total,
        }
        for name, times in names.items()
    ]
    rows.sort(key=lambda row: -row["microseconds"])
    busy, end, gaps = 0.0, None, []
    for event in sorted(kernels, key=lambda event: event["ts"]):
        start, stop = event["ts"], event["ts"] + event["dur"]
        if end is None or start >= end:
            if end is not None:
                gaps.append(start - end)
            busy += event["dur"]
            end = stop
        elif stop > end:
            busy += stop - end
            end = stop
    return {
        "kernels": len(kernels) / STEPS,
        "busy_microseconds": busy / STEPS,
        "idle_microseconds": sum(gaps) / STEPS,
        "largest_gap_microseconds": max(gaps, default=0.0),
        "by_name": rows[:_MOST_ROWS],
    }


def as_text(variant: Record) -> str:
    """The profile of a variant, for people."""
    lines = [variant["name"]]
    if variant["reason"] is not None:
        lines.append(f"not as it should be: {variant['reason']}")
    if "cpu" not in variant:
        return "\n".join(lines)
    gpu = variant["gpu"]
    if gpu is not None:
        lines.append(
            f"a step: {gpu['kernels']:.0f} kernels, busy {gpu['busy_microseconds']:.0f} us, "
            f"idle between them {gpu['idle_microseconds']:.0f} us "
            f"(largest gap {gpu['largest_gap_microseconds']:.0f} us)"
        )
        lines += [
            f"{row['microseconds']:>12.1f} us {row['share']:>6.1%} {row['count']:>7.1f}  {row['name'][:120]}"
            for row in gpu["by_name"]
        ]
    lines.append("CPU, own time:")
    lines += [
        f"{row['microseconds']:>12.1f} us {row['count']:>14.1f}  {row['name'][:120]}"
        for row in variant["cpu"]
    ]
    return "\n".join(lines)
