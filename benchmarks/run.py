"""The runner: case by case, a record that is written after each of them.

What is measured of a case is in contest.py, what makes a variant right in gate.py, what counts as memory in
memory.py.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.cases import GENERATE, Case, build_batch, toy
from benchmarks.contest import Contest, reason_of
from benchmarks.limits import Ceilings, Work, measure_ceilings, work_of
from benchmarks.timing import FEWEST_ROUNDS, Budget
from benchmarks.variants import REFERENCE, VARIANTS, Variant
from softprompt.files import write_text

TOY_SHRINK = 16

Record = dict[str, Any]


def run(
    cases: Sequence[Case],
    *,
    variants: Sequence[Variant] = VARIANTS,
    rounds: int | None = None,
    tiny: bool = False,
    budget: float | None = None,
    say: Callable[[str], None] = print,
    save: Callable[[Record], object] = lambda record: None,
) -> Record:
    """Runs cases of one device, one after the other, and returns the record.

    Args:
        cases: what to run.
        variants: who runs it; the first one must be PEFT, everything is compared with it.
        rounds: timed steps of each variant; None: as many as each case says.
        tiny: toy sizes, to test the runner.
        budget: seconds; where they run short, variants that are not needed are left out, and rounds beyond
            the seventh.
        say: takes a line of progress.
        save: takes the record after each case.

    Raises:
        ValueError: no case, cases of several devices, or PEFT not first.
    """
    devices = {case.device for case in cases}
    if len(devices) != 1:
        raise ValueError(f"expected cases of one device, got {', '.join(sorted(devices)) or 'no case'}")
    if not variants or variants[0] is not REFERENCE:
        raise ValueError("the first variant must be PEFT: checks and ratios are against it")
    intended = devices.pop()
    cases = [toy(case) if tiny else case for case in cases]
    record = new_record(cases[0].device, intended, tiny=tiny)
    record["cases"] = []
    clock = Budget(budget)
    stage = _Stage(cases[0].device, rounds, clock, strict=intended == "cpu", tiny=tiny, say=say)
    for number, case in enumerate(cases):
        reserved = sum(later.seconds for later in cases[number + 1 :])
        record["cases"].append(stage.run(case, variants, reserved))
        save(record)
    return record


def new_record(device: str, suite: str, *, tiny: bool) -> Record:
    """What every record begins with."""
    described = machine.describe_device(device)
    if tiny:
        described["folder"] = f"toy-{described['folder']}"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "device": described,
        "versions": machine.versions(),
        "suite": suite,
        "tiny": tiny,
    }


def write_record(record: Record, results: Path, *, name: str | None = None) -> Path:
    """Writes `<results>/<device>/<date>-<commit>.json`, or the file of that name, whole or not at all.

    A record of the same second is replaced.
    """
    folder = results / str(record["device"]["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.fromisoformat(record["date"]).strftime("%Y-%m-%d-%H%M%S")
    suffix = "-kernels" if "kernels" in record else ""
    path = folder / (name or f"{stamp}-{record['commit']}{suffix}.json")
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
    return path


class _Stage:
    """What outlives a case: the model, as long as cases have one shape, and the device's ceilings."""

    def __init__(
        self,
        device: str,
        rounds: int | None,
        budget: Budget,
        *,
        strict: bool,
        tiny: bool,
        say: Callable[[str], None],
    ) -> None:
        self._device, self._rounds, self._budget = device, rounds, budget
        self._strict, self._tiny, self._say = strict, tiny, say
        self._base: Any = None
        self._built: tuple[Any, str] | None = None
        self._known: dict[str, Ceilings] = {}

    def run(self, case: Case, variants: Sequence[Variant], reserved: float) -> Record:
        began = time.perf_counter()
        try:
            record = self._run(case, variants, reserved)
        except Exception as error:  # the next case may be served by this device
            if self._strict:
                raise
            self._drop()
            record = {**describe_case(case), "reason": reason_of(error), "variants": []}
            self._say(f"{case.name}: NOT RUN, {record['reason']}")
        record["seconds"] = time.perf_counter() - began
        return record

    def _run(self, case: Case, variants: Sequence[Variant], reserved: float) -> Record:
        batch = build_batch(case)
        self._say(
            f"{case.name}: {case.shape.name}, {case.rows} rows of {batch.padded_length}, "
            f"P = {case.num_virtual_tokens}"
        )
        self._say(f"  lengths: {batch.source}")
        # Before the model: its matrices need room, too. A CPU's neighbours change, so it is asked each time.
        ceilings = self._ceilings(case) if self._device == "cuda" else None
        base = self._model(case)
        work = work_of(base, batch, case.num_virtual_tokens, case.num_prompts)
        rounds = self._rounds or max(case.rounds, 1 if self._strict else FEWEST_ROUNDS)
        if case.kind == GENERATE:
            from benchmarks.generation import GenerationContest as Kind
        else:
            Kind = Contest
        contest = Kind(
            case,
            base,
            batch,
            rounds=rounds,
            budget=self._budget,
            reserved=reserved,
            strict=self._strict,
        )
        records = contest.run(variants)
        if ceilings is None:
            ceilings = self._ceilings(case)
        record = {
            **describe_case(case),
            "reason": None,
            "batch": batch.describe(),
            "work": asdict(work) | {"token_flop": work.token_flop, "peft_token_flop": work.peft_token_flop},
            "attention_flop": {"packed": work.attention_flop, "peft": work.peft_attention_flop},
            "token_limit": work.token_limit,
            "ceilings": asdict(ceilings),
            # Of a training step; what generate needs at least is not counted.
            "floor_seconds": None if case.kind == GENERATE else ceilings.floor_seconds(work),
            "rounds": rounds,
            "truth": contest.truth_description(),
            "ratio_to": contest.ratio_to,
            "variants": records,
        }
        del contest
        self._tidy()
        for line in _lines(record, ceilings, work):
            self._say(line)
        return record

    def _model(self, case: Case) -> Any:
        wanted = (case.shape, case.dtype)
        if self._strict or self._built != wanted:
            self._drop()
            self._base = case.shape.build(getattr(torch, case.dtype), case.device)
            self._built = wanted
        return self._base

    def _drop(self) -> None:
        self._base, self._built = None, None
        self._tidy()

    def _tidy(self) -> None:
        gc.collect()
        if self._device == "cuda":
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()

    def _ceilings(self, case: Case) -> Ceilings:
        if self._device == "cpu" or case.dtype not in self._known:
            shrink = TOY_SHRINK if self._tiny else 1
            self._known[case.dtype] = measure_ceilings(getattr(torch, case.dtype), case.device, shrink=shrink)
        return self._known[case.dtype]


def describe_case(case: Case) -> Record:
    """For the record."""
    return {
        "name": case.name,
        "why": case.why,
        "kind": case.kind,
        "shape": asdict(case.shape),
        "rows": case.rows,
        "num_virtual_tokens": case.num_virtual_tokens,
        "num_prompts": case.num_prompts,
        "new_tokens": case.new_tokens,
        "pad_to": case.pad_to,
        "padding_side": case.padding_side,
        "dtype": case.dtype,
        "tolerances": {"loss": case.loss_tolerance, "gradient": case.gradient_tolerance},
        "targets": asdict(case.targets),
    }


def _lines(record: Record, ceilings: Ceilings, work: Work) -> list[str]:
    floor = "" if record["floor_seconds"] is None else f"floor {1e3 * record['floor_seconds']:.1f} ms; "
    lines = [
        f"  {ceilings.flop_per_second / 1e9:.0f} GFLOP/s, {ceilings.bytes_per_second / 1e9:.1f} GB/s: "
        f"{floor}token limit {work.token_limit:.2f}x"
    ]
    for variant in record["variants"]:
        check, timed = variant["check"], variant["time"]
        if variant["reason"] is not None:
            lines.append(f"  {variant['name']}: not timed, {variant['reason']}")
            continue
        errors = (
            ""
            if check is None
            else ", ".join(
                f"{name} {'not finite' if value is None else f'{value:.1e}'}"
                for name, value in check.items()
                if name != "passed"
            )
        )
        if timed is None:
            lines.append(f"  {variant['name']}: CHECK FAILED, not timed ({errors})")
            continue
        peak = variant["peak_bytes"]
        memory = "" if peak is None else f", peak {peak / 1e6:.1f} MB"
        ratio = f", {timed['ratio']:.2f}x" if "ratio" in timed else ""
        lines.append(
            f"  {variant['name']}: {1e3 * timed['p50']:.1f} ms "
            f"({1e3 * timed['p20']:.1f} to {1e3 * timed['p80']:.1f}){ratio}{memory}; {errors}"
        )
    return lines
