"""The runner. For each case and variant: first the check against PEFT, then memory and time.

A variant whose loss or prompt gradient is not PEFT's is not measured at all.

Peak memory is what one forward and backward hold above what was there before the step: on CUDA torch's own
maximum, on the CPU the bytes of torch's allocator, which do not change from run to run and do not see memory
that matrix libraries take for themselves. The resident set, looked at once (`article`, `paper`), grew by
5 % more than counted for PEFT's gigabytes, 40 to 50 MB more for softprompt.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.cases import Case, StepBatch, build_batch, toy
from benchmarks.limits import Ceilings, Work, measure_ceilings, now, work_of
from benchmarks.variants import REFERENCE, VARIANTS, Variant
from softprompt.tasks.compare import measure_peak_bytes

WARM_UP_ROUNDS = 2
LEARNING_RATE = 3e-2
TOY_SHRINK = 16

Record = dict[str, Any]


def run(
    cases: Sequence[Case],
    *,
    variants: Sequence[Variant] = VARIANTS,
    rounds: int | None = None,
    tiny: bool = False,
    say: Callable[[str], None] = print,
) -> Record:
    """Runs cases of one device, one after the other, and returns the record.

    Args:
        cases: what to run.
        variants: who runs it; the first one must be PEFT, everything is compared with it.
        rounds: timed steps of each variant; None: as many as each case says.
        tiny: toy sizes, to test the runner.
        say: takes a line of progress.

    Raises:
        ValueError: no case, cases of several devices, or PEFT not first.
    """
    devices = {case.device for case in cases}
    if len(devices) != 1:
        raise ValueError(f"expected cases of one device, got {', '.join(sorted(devices)) or 'no case'}")
    if not variants or variants[0] is not REFERENCE:
        raise ValueError("the first variant must be PEFT: checks and ratios are against it")
    device = machine.describe_device(devices.pop())
    if tiny:
        device["folder"] = f"toy-{device['folder']}"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "device": device,
        "versions": machine.versions(),
        "tiny": tiny,
        "cases": [
            _run_case(
                toy(case) if tiny else case, variants, rounds or case.rounds, TOY_SHRINK if tiny else 1, say
            )
            for case in cases
        ],
    }


def write_record(record: Record, results: Path) -> Path:
    """Writes `<results>/<device>/<date>-<commit>.json`; one of the same second is replaced."""
    folder = results / str(record["device"]["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.fromisoformat(record["date"]).strftime("%Y-%m-%d-%H%M%S")
    path = folder / f"{stamp}-{record['commit']}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


@dataclass(eq=False)
class _Runner:
    """One variant on one case."""

    variant: Variant
    model: Any
    prompt: nn.Parameter
    step: Callable[[], None]


def _run_case(
    case: Case, variants: Sequence[Variant], rounds: int, shrink: int, say: Callable[[str], None]
) -> Record:
    batch = build_batch(case)
    say(
        f"{case.name}: {case.shape.name}, {case.rows} rows of {batch.padded_length}, "
        f"P = {case.num_virtual_tokens}"
    )
    say(f"  lengths: {batch.source}")
    dtype = getattr(torch, case.dtype)
    base = case.shape.build(dtype, case.device)
    work = work_of(base, batch, case.num_virtual_tokens)
    runners = [_runner(variant, base, case, batch) for variant in variants]
    for runner in runners[1:]:
        runner.prompt.data.copy_(runners[0].prompt.data)
    checks = _checks(case, runners, batch)
    passed = [runner for runner, check in zip(runners, checks, strict=True) if check["passed"]]
    memory = {runner.variant.name: measure_peak_bytes(runner.model, batch.inputs) for runner in passed}
    ceilings = measure_ceilings(dtype, case.device, shrink=shrink)
    seconds = interleaved({runner.variant.name: runner.step for runner in passed}, rounds, case.device)
    record = {
        **_describe_case(case),
        "batch": batch.describe(),
        "work": asdict(work) | {"token_flop": work.token_flop, "peft_token_flop": work.peft_token_flop},
        "attention_flop": {"packed": work.attention_flop, "peft": work.peft_attention_flop},
        "token_limit": work.token_limit,
        "ceilings": asdict(ceilings),
        "floor_seconds": ceilings.floor_seconds(work),
        "rounds": rounds,
        "variants": [
            {
                "name": runner.variant.name,
                "about": runner.variant.about,
                "check": check,
                "time": _summary(seconds, runner.variant.name) if check["passed"] else None,
                "peak_bytes": memory.get(runner.variant.name),
            }
            for runner, check in zip(runners, checks, strict=True)
        ],
    }
    for line in _lines(record, ceilings, work):
        say(line)
    del runners, passed, base
    gc.collect()
    return record


def _runner(variant: Variant, base: Any, case: Case, batch: StepBatch) -> _Runner:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=case.num_virtual_tokens)
    torch.manual_seed(1)
    model = variant.build(base, config).to(case.device)
    model.train()
    (prompt,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        model(**batch.inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return _Runner(variant, model, prompt, step)


def _checks(case: Case, runners: Sequence[_Runner], batch: StepBatch) -> list[Record]:
    """Loss and prompt gradient of every variant against the first one's, on the batch that is timed."""
    expected_loss, expected_grad = _loss_and_gradient(runners[0], batch)
    norm = float(expected_grad.norm())
    if not (math.isfinite(expected_loss) and math.isfinite(norm) and norm > 0):
        raise ValueError(
            f"{case.name}: PEFT's loss is {expected_loss} and its gradient's norm {norm}: no reference"
        )
    checks = []
    for runner in runners:
        loss, grad = (
            (expected_loss, expected_grad) if runner is runners[0] else _loss_and_gradient(runner, batch)
        )
        loss_difference = abs(loss - expected_loss)
        gradient_error = float((grad - expected_grad).norm()) / norm
        checks.append(
            {
                # NaN is no number in JSON, and passes no comparison.
                "loss_difference": loss_difference if math.isfinite(loss_difference) else None,
                "gradient_error": gradient_error if math.isfinite(gradient_error) else None,
                "passed": loss_difference <= case.loss_tolerance
                and gradient_error <= case.gradient_tolerance,
            }
        )
    return checks


def _loss_and_gradient(runner: _Runner, batch: StepBatch) -> tuple[float, Tensor]:
    loss = runner.model(**batch.inputs).loss
    loss.backward()
    if runner.prompt.grad is None:
        raise ValueError(f"{runner.variant.name}: the backward gave the prompt no gradient")
    grad = runner.prompt.grad.double()
    runner.model.zero_grad()
    return float(loss.detach()), grad


def interleaved(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step, A B A B ..., so that whatever else the machine does meets all variants alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP_ROUNDS + rounds):
        for name, step in steps.items():
            start = now(device)
            step()
            if number >= WARM_UP_ROUNDS:
                seconds[name].append(now(device) - start)
    return seconds


def _summary(seconds: dict[str, list[float]], name: str) -> Record:
    """Percentiles of a variant, and how many times faster than PEFT it is: by round, and by the medians."""
    own, reference = seconds[name], seconds[REFERENCE.name]
    return {
        "seconds": own,
        "p20": _percentile(own, 0.2),
        "p50": _percentile(own, 0.5),
        "p80": _percentile(own, 0.8),
        "ratio": statistics.median(theirs / ours for theirs, ours in zip(reference, own, strict=True)),
        "ratio_of_medians": statistics.median(reference) / statistics.median(own),
    }


def _percentile(values: list[float], share: float) -> float:
    """Linear between the two nearest values."""
    ordered = sorted(values)
    below, part = divmod(share * (len(ordered) - 1), 1)
    low, high = ordered[int(below)], ordered[min(int(below) + 1, len(ordered) - 1)]
    return low + part * (high - low)


def _describe_case(case: Case) -> Record:
    return {
        "name": case.name,
        "why": case.why,
        "shape": asdict(case.shape),
        "rows": case.rows,
        "num_virtual_tokens": case.num_virtual_tokens,
        "pad_to": case.pad_to,
        "dtype": case.dtype,
        "tolerances": {"loss": case.loss_tolerance, "gradient": case.gradient_tolerance},
        "targets": asdict(case.targets),
    }


def _lines(record: Record, ceilings: Ceilings, work: Work) -> list[str]:
    lines = [
        f"  {ceilings.flop_per_second / 1e9:.0f} GFLOP/s, {ceilings.bytes_per_second / 1e9:.1f} GB/s: "
        f"floor {1e3 * record['floor_seconds']:.1f} ms; token limit {work.token_limit:.2f}x"
    ]
    for variant in record["variants"]:
        check, time = variant["check"], variant["time"]
        if time is None:
            lines.append(
                f"  {variant['name']}: CHECK FAILED, not timed (loss off by {check['loss_difference']}, "
                f"prompt gradient by {check['gradient_error']})"
            )
            continue
        lines.append(
            f"  {variant['name']}: {1e3 * time['p50']:.1f} ms "
            f"({1e3 * time['p20']:.1f} to {1e3 * time['p80']:.1f}), "
            f"{time['ratio']:.2f}x, peak {variant['peak_bytes'] / 1e6:.1f} MB, loss off by "
            f"{check['loss_difference']:.1e}, prompt gradient by {check['gradient_error']:.1e}"
        )
    return lines
