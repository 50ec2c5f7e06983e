"""Scores of a classifier that writes its labels."""

import json
import math
from collections.abc import Sequence
from typing import Any


def exact_match(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """Return the share of rows whose predicted label is the expected one.

    Raises:
        ValueError: the sequences are empty or differ in length.
    """
    if not expected or len(predicted) != len(expected):
        raise ValueError(f"expected as many predictions as labels, got {len(predicted)} and {len(expected)}")
    return sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(expected)


def confusion_counts(
    predicted: Sequence[str], expected: Sequence[str], labels: Sequence[str]
) -> list[list[int]]:
    """Return how many rows of each label (first index) were predicted as each label (second index).

    Raises:
        ValueError: the sequences are empty or differ in length, or hold something else than `labels`.
    """
    if not expected or len(predicted) != len(expected):
        raise ValueError(f"expected as many predictions as labels, got {len(predicted)} and {len(expected)}")
    foreign = sorted({*predicted, *expected} - set(labels))
    if foreign:
        raise ValueError(f"expected only the labels {', '.join(labels)}, got {', '.join(foreign)}")
    number = {label: index for index, label in enumerate(labels)}
    counts = [[0] * len(labels) for _ in labels]
    for p, e in zip(predicted, expected, strict=True):
        counts[number[e]][number[p]] += 1
    return counts


def macro_f1(counts: Sequence[Sequence[int]]) -> float:
    """Return the mean F1 of the labels, from `confusion_counts`: all labels weigh alike, frequent or rare.

    `F1 = 2 * hits / (rows of the label + rows predicted as it)`; labels that no row has and that were never
    predicted are left out.
    """
    totals = [sum(row) + sum(other[i] for other in counts) for i, row in enumerate(counts)]
    scores = [2 * counts[i][i] / total for i, total in enumerate(totals) if total]
    return sum(scores) / len(scores)


def perplexity(loss: float) -> float:
    """Return exp(loss) of a mean loss in nats per token; infinity where it does not fit a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def to_json(scores: Any) -> str:
    """Return the scores as JSON text; numbers that JSON cannot hold (infinite, not a number) become null."""
    return json.dumps(_finite(scores), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
