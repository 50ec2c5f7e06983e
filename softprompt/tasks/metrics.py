"""Scores of predicted labels and of generated texts."""

import json
import math
import re
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


class _Words:
    """The words of a text for ROUGE: what rouge-score takes by itself, and letters of other scripts, too."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def text_scores(written: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Return how near N written texts are to their N targets.

    Returns:
        `exact_match`, the share of texts that are their targets; `rouge_l`, the mean F-measure of their
        longest common subsequences of words, from 0 to 1 (rouge-score, without stemming); `bleu` of all
        texts together, from 0 to 100 (sacrebleu's defaults; n-grams longer than everything written do not
        count, without which short texts would score 0 whatever they are).

    Raises:
        ValueError: the sequences are empty or differ in length.
    """
    from rouge_score.rouge_scorer import RougeScorer  # takes seconds to import
    from sacrebleu.metrics import BLEU

    share = exact_match(written, targets)  # checks the lengths
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    rouge = [
        scorer.score(target, text)["rougeL"].fmeasure for text, target in zip(written, targets, strict=True)
    ]
    bleu = BLEU(effective_order=True, force=True).corpus_score(list(written), [list(targets)]).score
    return {"exact_match": share, "rouge_l": sum(rouge) / len(rouge), "bleu": bleu}


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
