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


def accuracy_and_f1(predicted: Sequence[str], expected: Sequence[str]) -> tuple[float, float]:
    """Return the accuracy, and the macro-F1: the mean F1 of all labels that a row has or got.

    Raises:
        ValueError: the sequences are empty or differ in length.
    """
    from sklearn.metrics import f1_score  # takes a second to import

    accuracy = exact_match(predicted, expected)
    return accuracy, float(f1_score(list(expected), list(predicted), average="macro", zero_division=0.0))


def confusion_counts(
    predicted: Sequence[str], expected: Sequence[str], labels: Sequence[str]
) -> list[list[int]]:
    """Return how many rows of each label (first index) were predicted as each label (second index).

    Raises:
        ValueError: the sequences are empty or differ in length, or hold something else than `labels`.
    """
    from sklearn.metrics import confusion_matrix

    exact_match(predicted, expected)  # checks the lengths
    unknown = sorted({*predicted, *expected} - set(labels))
    if unknown:
        raise ValueError(f"expected only the labels {', '.join(labels)}, got {', '.join(unknown)}")
    counts: list[list[int]] = confusion_matrix(expected, predicted, labels=list(labels)).tolist()
    return counts


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
