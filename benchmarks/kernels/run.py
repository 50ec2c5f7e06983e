"""The runner of the kernel cases: check against a reference in higher precision, then time."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.contest import reason_of
from benchmarks.kernels import head
from benchmarks.kernels.clock import WARM_UP_CALLS, Timed, timed
from benchmarks.kernels.problem import (
    KernelCase,
    KernelTargets,
    KernelVariant,
    NotAvailable,
    Outputs,
    Problem,
    dtype_of,
    error_of,
)
from benchmarks.limits import Ceilings, measure_ceilings
from benchmarks.run import TOY_SHRINK, new_record
from benchmarks.timing import FEWEST_ROUNDS, Budget, summary

Record = dict[str, Any]
_COMPILE_SECONDS = 12.0  # estimated, until one was seen
_MOST_SECONDS = 4.0  # of the timed rounds of one case


def run_kernels(
    cases: Sequence[KernelCase],
    *,
    device: str,
    rounds: int | None = None,
    tiny: bool = False,
    budget: float | None = None,
    say: Callable[[str], None] = print,
    save: Callable[[Record], object] = lambda record: None,
) -> Record:
    """Runs kernel cases and returns the record.

    Args:
        cases: what to run.
        device: "cuda" or "cpu".
        rounds: samples of each variant; None: 15, fewer where they take long, but at least seven.
        tiny: toy sizes, to test the runner.
        budget: seconds; where they run short, what is compiled and what is no peer is left out, and then
            whole cases.
        say: takes a line of progress.
        save: takes the record after each case.
    """
    record = new_record(device, "kernels", tiny=tiny)
    ceilings = measure_ceilings(dtype_of(device), device, shrink=TOY_SHRINK if tiny else 1)
    record["ceilings"] = asdict(ceilings)
    record["dtype"] = str(dtype_of(device)).removeprefix("torch.")
    record["kernels"] = []
    stage = _Stage(device, rounds, Budget(budget), ceilings, tiny=tiny, say=say)
    for number, case in enumerate(cases):
        record["kernels"].append(stage.run(case, len(cases) - number - 1))
        save(record)
    head.forget()
    return record


class _Stage:
    """What outlives a case."""

    def __init__(
        self,
        device: str,
        rounds: int | None,
        budget: Budget,
        ceilings: Ceilings,
        *,
        tiny: bool,
        say: Callable[[str], None],
    ) -> None:
        self._device, self._rounds, self._budget = device, rounds, budget
        self._ceilings, self._tiny, self._say = ceilings, tiny, say
        self._compile_seconds = _COMPILE_SECONDS
        self._case_seconds = 1.0  # the mean so far, compiling aside

    def run(self, case: KernelCase, cases_left: int) -> Record:
        """One case; what fails is named."""
        began = time.perf_counter()
        record: Record = {
            "name": case.name,
            "op": case.op,
            "about": case.about,
            "targets": asdict(KernelTargets() if self._tiny else case.targets_on(self._device)),
            "reason": self._budget.refuses(self._case_seconds, 0.0),
            "floor_seconds": None,
            "variants": [],
        }
        if record["reason"] is None:
            try:
                self._measure(case, record, self._case_seconds * cases_left)
            except Exception as error:
                record["reason"] = reason_of(error)
        self._tidy()
        record["seconds"] = time.perf_counter() - began
        for line in _lines(record):
            self._say(line)
        return record

    def _measure(self, case: KernelCase, record: Record, reserved: float) -> None:
        began = time.perf_counter()
        compiling = 0.0
        problem = case.build(case.toy if self._tiny else case.sizes, self._device)
        record["floor_seconds"] = self._ceilings.floor_of(problem.flop, problem.moved_bytes)
        record["flop"], record["moved_bytes"] = problem.flop, problem.moved_bytes
        truth = problem.truth()
        admitted: list[tuple[Record, Timed]] = []
        for variant in problem.variants:
            entry: Record = {
                "name": variant.name,
                "own": variant.own,
                "errors": None,
                "passed": False,
                "time": None,
                "reason": self._refusal(variant, reserved),
            }
            record["variants"].append(entry)
            if entry["reason"] is not None:
                continue
            start = time.perf_counter()
            clock = self._admitted(variant, problem, truth, entry)
            spent = time.perf_counter() - start
            if variant.compiles:
                compiling += spent
                self._compile_seconds = max(spent, 1.0)
            if clock is not None:
                admitted.append((entry, clock))
        self._time(admitted)
        own = time.perf_counter() - began - compiling
        self._case_seconds = 0.7 * self._case_seconds + 0.3 * own

    def _refusal(self, variant: KernelVariant, reserved: float) -> str | None:
        if not (variant.optional or variant.compiles):
            return None
        # A compiler (FlexAttention's, too) takes no time from the cases that come later.
        return self._budget.refuses(self._compile_seconds if variant.compiles else 1.0, reserved)

    def _admitted(
        self, variant: KernelVariant, problem: Problem, truth: Outputs, entry: Record
    ) -> Timed | None:
        """The clock of a variant that is right; its errors, or why it cannot run, are left in the entry."""
        try:
            function = variant.make()
            function()
            outputs = variant.comparable(function())
            if len(outputs) != len(truth):
                raise ValueError(f"it gave {len(outputs)} tensors, expected {len(truth)}")
            errors = [error_of(out, true) for out, true in zip(outputs, truth, strict=True)]
            entry["errors"] = [error if math.isfinite(error) else None for error in errors]
            entry["passed"] = all(
                error <= allowed for error, allowed in zip(errors, problem.tolerances, strict=True)
            )
            if not entry["passed"]:
                return None
            del outputs
            for _ in range(1 if self._tiny else WARM_UP_CALLS):
                function()
            return timed(function, self._device)
        except NotAvailable as error:
            entry["reason"] = str(error)
        except Exception as error:  # a peer may fail in any way, and that must not end the run
            entry["reason"] = reason_of(error)
        self._tidy()
        return None

    def _time(self, admitted: list[tuple[Record, Timed]]) -> None:
        samples: list[list[float]] = [[] for _ in admitted]
        began = time.perf_counter()
        for number in range(self._rounds or 15):
            enough = self._rounds is None and number >= FEWEST_ROUNDS
            if enough and time.perf_counter() - began > _MOST_SECONDS:
                break
            for own, (_, clock) in zip(samples, admitted, strict=True):
                own.append(clock.sample())
        for own, (entry, clock) in zip(samples, admitted, strict=True):
            if own:
                entry["time"] = summary(own) | {"how": clock.how}

    def _tidy(self) -> None:
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()


def _lines(record: Record) -> list[str]:
    if record["reason"] is not None:
        return [f"{record['name']}: NOT RUN, {record['reason']}"]
    lines = [f"{record['name']}: {record['about']}; floor {1e6 * record['floor_seconds']:.1f} us"]
    for variant in record["variants"]:
        if variant["time"] is not None:
            found = variant["time"]
            lines.append(
                f"  {variant['name']}: {1e6 * found['p50']:.1f} us "
                f"({1e6 * found['p20']:.1f} to {1e6 * found['p80']:.1f}), "
                f"{found['p50'] / record['floor_seconds']:.2f} x floor; {found['how']}"
            )
        elif variant["reason"] is not None:
            lines.append(f"  {variant['name']}: not timed, {variant['reason']}")
        else:
            lines.append(f"  {variant['name']}: CHECK FAILED, not timed (errors {variant['errors']})")
    return lines
