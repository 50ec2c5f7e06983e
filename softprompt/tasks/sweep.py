"""A grid of training runs: what each of them is, what is kept of it, and what all of them say together."""

import hashlib
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.tasks.folders import read_object

RECORD = "run.json"
SCORES = ("eval_exact_match", "eval_loss", "train_loss")  # of which a setting has mean and spread
KEPT = (*SCORES, "eval_perplexity", "steps", "trainable_parameters", "diverged")  # what the table shows


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        values: of the fields that the sweep is over, in their order.
        seed: of the prompt and of the order of the rows.
        settings: all that decides the trained prompt, with `values` and the seed.
    """

    values: dict[str, Any]
    seed: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """`run-` and a hash of the settings: the same run has the same name in every sweep."""
        content = json.dumps(self.settings, sort_keys=True)
        return f"run-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def grid(over: Mapping[str, Sequence[Any]], seeds: Sequence[int], settings: Mapping[str, Any]) -> list[Run]:
    """Every combination of the values of `over` with every seed; what `over` leaves out is in `settings`."""
    combinations = [dict(zip(over, values, strict=True)) for values in itertools.product(*over.values())]
    return [
        Run(values, seed, {**settings, **values, "seed": seed}) for values in combinations for seed in seeds
    ]


def batches_of_runs(runs: Sequence[Run], same: Sequence[str], *, together: int) -> list[list[Run]]:
    """Runs to be trained together: those that have the settings of `same` in common, so many at most."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run.settings[name] for name in same])
        groups.setdefault(key, []).append(run)
    return [group[i : i + together] for group in groups.values() for i in range(0, len(group), together)]


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a finished run left in its folder, None where it has not finished or cannot be read."""
    record = read_object(folder / RECORD)
    return record if record is not None and record.keys() >= set(KEPT) else None


def fields_of(table: Path) -> list[str] | None:
    """The fields that the sweep of a `sweep.json` is over, None where there is none that can be read."""
    fields = (read_object(table) or {}).get("over")
    return fields if isinstance(fields, list) else None


def table_of(runs: Sequence[Run], records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per run: the swept values, the seed, the scores, and the name of its folder."""
    rows = []
    for run in runs:
        record = records[run.name]
        rows.append({**run.values, "seed": run.seed, **{k: record[k] for k in KEPT}, "run": run.name})
    return rows


def summary_of(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds, setting by setting.

    Every score has its `mean`, its `std` (of the sample, n - 1; None for one run), `min` and `max` over the
    runs of the setting that did not diverge, and None where none is left.
    """
    settings: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        settings.setdefault(json.dumps([row[name] for name in fields]), []).append(row)
    result = []
    for group in settings.values():
        sound = [row for row in group if not row["diverged"]]
        result.append(
            {
                **{name: group[0][name] for name in fields},
                "runs": len(group),
                "diverged": len(group) - len(sound),
                **{score: _spread([row[score] for row in sound]) for score in SCORES},
            }
        )
    return result


def best_setting(summary: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The setting with the highest mean accuracy, of several the one with the lowest mean loss."""
    found = [entry for entry in summary if entry["eval_loss"] is not None and not entry["diverged"]]
    return max(found, key=lambda e: (e["eval_exact_match"]["mean"], -e["eval_loss"]["mean"]), default=None)


def _spread(values: Sequence[float]) -> dict[str, float | None] | None:
    if not values:
        return None
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
    }
