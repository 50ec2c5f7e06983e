"""Two models trained side by side on the same batches: losses, milliseconds and memory of both."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import get_linear_schedule_with_warmup

WARM_UP_STEPS = 3

Batch = dict[str, torch.Tensor]


@dataclass
class Side:
    """One of the models, and what was measured of it.

    Attributes:
        name: how figures and tables call it.
        model: the PEFT model.
        losses: training loss of every step.
        milliseconds: time of every step, forward, backward and optimizer.
        peak_bytes: most memory that one forward and backward held above what was there before the first step.
        accuracy_before: exact match on the evaluation table before training.
        accuracy_after: exact match on the evaluation table after training.
    """

    name: str
    model: Any = field(repr=False)
    losses: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    accuracy_before: float = 0.0
    accuracy_after: float = 0.0

    @property
    def median_milliseconds(self) -> float:
        """Median time of a step, without the first ones."""
        return statistics.median(self.milliseconds[WARM_UP_STEPS:] or self.milliseconds)


def largest_difference(first: Side, second: Side) -> float:
    """Return the largest |loss - loss| of the same step."""
    return max(abs(a - b) for a, b in zip(first.losses, second.losses, strict=True))


def scores_of(plain: Side, patched: Side) -> dict[str, Any]:
    """Return what was measured of both, for a JSON file."""
    return {
        "largest_loss_difference": largest_difference(plain, patched),
        "time_ratio": plain.median_milliseconds / patched.median_milliseconds,
        "memory_ratio": plain.peak_bytes / patched.peak_bytes,
        "sides": [
            {
                "name": side.name,
                "accuracy_before": side.accuracy_before,
                "accuracy_after": side.accuracy_after,
                "median_milliseconds": side.median_milliseconds,
                "peak_bytes": side.peak_bytes,
                "losses": side.losses,
                "milliseconds": side.milliseconds,
            }
            for side in (plain, patched)
        ],
    }


def train_side_by_side(
    sides: Sequence[Side],
    batches: Sequence[Batch],
    *,
    learning_rate: float,
    progress: Callable[[], None] | None = None,
) -> None:
    """Train every side with AdamW and a linear schedule, one step of each in turn on every batch.

    The side that goes first changes from step to step, so that whatever else the machine does meets
    all sides alike.
    """
    steps = []
    for side in sides:
        side.model.train()
        parameters = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
        steps.append((side, optimizer, get_linear_schedule_with_warmup(optimizer, 0, len(batches))))
    for number, batch in enumerate(batches):
        order = steps if number % 2 == 0 else steps[::-1]
        for side, optimizer, schedule in order:
            start = _now(side.model.device)
            loss = side.model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            side.milliseconds.append(1e3 * (_now(side.model.device) - start))
            schedule.step()
            side.losses.append(float(loss.detach()))
        if progress is not None:
            progress()


def measure_peak_bytes(model: Any, batch: Batch) -> int:
    """Return the most bytes that one forward and backward held above what was held before.

    Warm-up steps come first. On CUDA, what they leave in place (captured graphs) counts. On the CPU the bytes
    are those of torch's allocator during the last step, from its profiler, whatever else runs meanwhile.
    """
    model.train()
    cuda = model.device.type == "cuda"
    before = torch.cuda.memory_allocated(model.device) if cuda else 0
    for _ in range(WARM_UP_STEPS):
        _forward_backward(model, batch)
    if not cuda:
        return profiled_peak_bytes(lambda: _forward_backward(model, batch))
    torch.cuda.reset_peak_memory_stats(model.device)
    _forward_backward(model, batch)
    return int(torch.cuda.max_memory_allocated(model.device) - before)


def _forward_backward(model: Any, batch: Batch) -> None:
    model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


def profiled_peak_bytes(step: Callable[[], None]) -> int:
    """Return the most bytes that a warmed-up step held in torch's CPU allocator above those before it."""
    with tempfile.TemporaryDirectory() as folder:
        trace = str(Path(folder) / "trace.json")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        profiler.export_chrome_trace(trace)
        events = json.loads(Path(trace).read_text(encoding="utf-8"))["traceEvents"]
    memory = [(event["ts"], event["args"]) for event in events if event.get("name") == "[memory]"]
    memory.sort(key=lambda timed: timed[0])
    held = [arguments["Total Allocated"] for _, arguments in memory]
    return int(max(held) - (held[0] - memory[0][1]["Bytes"]))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
