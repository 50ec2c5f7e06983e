"""A sweep over the launch configurations of the attention kernels, one kernel at a time, on a GPU.

Every configuration is checked before it is timed. What wins goes by hand into the table of
`softprompt/ops/shared_prompt_attention/configs.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.contest import reason_of
from benchmarks.kernels.attention import tolerances, truth
from benchmarks.kernels.attention_problem import attention_problem
from benchmarks.kernels.clock import timed
from benchmarks.kernels.problem import KernelCase, error_of
from benchmarks.run import new_record
from benchmarks.timing import FEWEST_ROUNDS, Budget, summary
from softprompt.ops.shared_prompt_attention import shared_prompt_attention
from softprompt.ops.shared_prompt_attention.configs import (
    KINDS,
    LaunchConfig,
    architecture,
    launch_config,
    launch_configs,
    launched_with,
)

Record = dict[str, Any]


def tune(
    cases: Sequence[KernelCase],
    *,
    device: str,
    tiny: bool = False,
    most: int | None = None,
    budget: float | None = None,
    say: Callable[[str], None] = print,
    save: Callable[[Record], object] = lambda record: None,
) -> Record:
    """Times the candidates of each kernel, with the best of the kernels before it.

    Args:
        cases: attention cases; each is taken with its backward.
        device: "cuda", or "cpu" in a rehearsal.
        tiny: toy sizes.
        most: candidates of each kernel; None: all.
        budget: seconds, shared evenly by what is left to do.
        say: takes a line of progress.
        save: takes the record after each kernel.
    """
    record = new_record(device, "tune", tiny=tiny) | {"tune": []}
    clock = Budget(budget)
    jobs = [(case, kind) for case in cases for kind in KINDS]
    chosen: dict[str, dict[str, LaunchConfig]] = {}
    for number, (case, kind) in enumerate(jobs):
        left = clock.left()
        share = None if left is None else left / (len(jobs) - number)
        sizes = replace(case.toy if tiny else case.sizes, backward=kind != "forward")
        entry = _sweep(case, kind, sizes, device, chosen.setdefault(case.name, {}), most, share)
        record["tune"].append(entry)
        best = entry["results"][0] if entry["results"] and entry["results"][0]["time"] else None
        if best is not None:
            chosen[case.name][kind] = LaunchConfig(**best["config"])
            own = next((row for row in entry["results"] if row["default"]), None)
            gain = own["time"]["p50"] / best["time"]["p50"] if own and own["time"] else float("nan")
            say(
                f"{case.name}, {kind}: {best['config']} {1e6 * best['time']['p50']:.1f} us, "
                f"{gain:.2f} x as fast as the table's"
            )
        else:
            say(f"{case.name}, {kind}: nothing could be timed, {entry['reason']}")
        save(record)
    return record


def _sweep(
    case: KernelCase,
    kind: str,
    sizes: Any,
    device: str,
    chosen: dict[str, LaunchConfig],
    most: int | None,
    seconds: float | None,
) -> Record:
    entry: Record = {"case": case.name, "kernel": kind, "reason": None, "results": []}
    clock = Budget(seconds)
    try:
        problem = attention_problem(sizes, device)
        expected = truth(problem)
        itemsize = problem.query.element_size()
        arch = architecture(problem.query.device)
        default = launch_config(kind, sizes.head_dim, itemsize, arch)
        candidates = launch_configs(kind, sizes.head_dim, itemsize, arch)[:most]
    except Exception as error:
        entry["reason"] = reason_of(error)
        return entry
    run = problem.results(
        lambda q, k, v: shared_prompt_attention(
            q, k, v, problem.layout, alibi_slopes=problem.slopes, backend="triton"
        )
    )
    for config in candidates:
        if (clock.left() or 1.0) < 0:
            entry["reason"] = (
                f"time budget: {len(entry['results'])} of {len(candidates)} candidates were tried"
            )
            break
        row: Record = {"config": asdict(config), "default": config == default, "time": None, "reason": None}
        entry["results"].append(row)
        try:
            with launched_with(**(chosen | {kind: config})):
                errors = [error_of(out, true) for out, true in zip(problem.cut(run()), expected, strict=True)]
                allowed = tolerances(device, sizes.backward)
                if any(error > limit for error, limit in zip(errors, allowed, strict=True)):
                    row["reason"] = f"check failed: {errors}"
                    continue
                sample = timed(run, device).sample
                row["time"] = summary([sample() for _ in range(1 if device == "cpu" else FEWEST_ROUNDS)])
        except Exception as error:  # most often: more shared memory than the GPU has
            row["reason"] = reason_of(error)
            if device == "cuda":
                torch.cuda.empty_cache()
    entry["results"].sort(key=lambda row: row["time"]["p50"] if row["time"] else float("inf"))
    return entry
