"""Labels: their spelling, and what is said of them before training."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

# White space is not among them: str.strip knows it.
_NO_WIDTH = "\u180e\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
_WHOLE = re.compile(r"(-?\d+)\.0*")
_SHOWN = 20
FEWEST_TARGETS = 20  # in fewer rows labels may all be different by chance


def clean_label(cell: str) -> str:
    """Return a label without the spaces and the characters without width around it."""
    before, after = "", cell
    while before != after:
        before, after = after, after.strip().strip(_NO_WIDTH)
    return after


def are_targets(labels: Sequence[str]) -> bool:
    """Whether labels are texts to be generated: of many rows, and no two of them alike."""
    return len(labels) >= FEWEST_TARGETS and len(set(labels)) == len(labels)


def label_words(names: Sequence[str]) -> dict[str, str]:
    """Return the words that a model writes for the names of classes: underscores are spaces.

    Where two names would be the same words, every name is written as it is.
    """
    cleaned = [clean_label(name) for name in names]
    words = [clean_label(name.replace("_", " ")) for name in cleaned]
    if len(set(words)) < len(words) or not all(words):
        return {name: name for name in cleaned}
    return dict(zip(cleaned, words, strict=True))


def whole_number(text: str) -> str:
    """Return "1" for "1.0": a whole number as a person writes it. Any other text stays as it is."""
    found = _WHOLE.fullmatch(text)
    return str(int(found[1])) if found else text


def look_of(label: str) -> str:
    """Return what labels have in common that differ in case, spaces, invisible marks or number form alone."""
    seen = "".join(
        mark for mark in unicodedata.normalize("NFKC", label) if unicodedata.category(mark) != "Cf"
    )
    seen = " ".join(seen.casefold().split())
    try:
        return repr(float(seen))
    except ValueError:
        return seen


def look_alikes(labels: Sequence[str]) -> list[str]:
    """Return a sentence for each group of labels that differ in no more than `look_of` overlooks."""
    counts = Counter(labels)
    groups: dict[str, list[str]] = defaultdict(list)
    for label in sorted(counts):
        groups[look_of(label)].append(label)
    return [
        f"the labels {_with_counts(group, counts)} differ in case, spaces, invisible marks or number form "
        "alone, and are learnt as different labels: write them alike if they are one"
        for group in groups.values()
        if len(group) > 1
    ]


def label_counts(train: Sequence[str], others: Mapping[str, Sequence[str]]) -> str:
    """Return how many rows each label has, in all and kept for `others`, which are named by their use."""
    counts, kept = Counter(train), {use: Counter(labels) for use, labels in others.items()}
    total = sum(kept.values(), counts)
    parts = []
    for label, number in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]:
        uses = ", ".join(f"{count[label]:,} {use}" for use, count in {"for training": counts, **kept}.items())
        parts.append(f"{label!r} {number:,}" + (f" ({uses})" if kept else ""))
    more = len(total) - _SHOWN
    return ", ".join(parts) + (f", and {more} rarer labels" if more > 0 else "")


def evaluation_notes(known: Sequence[str], labels: Sequence[str], use: str) -> list[str]:
    """Return what is to be said of the rows that something is measured on."""
    lacking = [label for label in known if label not in set(labels)]
    notes = []
    if lacking:
        names = ", ".join(map(repr, lacking[:_SHOWN])) + (", ..." if len(lacking) > _SHOWN else "")
        notes.append(f"no {use} row has the label {names}, so nothing is measured of it")
    if len(labels) == 1:
        notes.append(f"there is 1 {use} row only: what is measured on it says little")
    return notes


def _with_counts(labels: Sequence[str], counts: Counter[str]) -> str:
    return ", ".join(f"{label!r} ({counts[label]:,} row{'s' * (counts[label] > 1)})" for label in labels)
