"""How many tokens real texts have, without a tokenizer.

A length is estimated from the text alone, so that a benchmark needs no model hub: words and punctuation marks
of the filled template, times TOKENS_PER_PIECE. Times depend on lengths only; the token ids are random.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random

TOKENS_PER_PIECE = 1.25
RULE = (
    f"ceil({TOKENS_PER_PIECE} x words and punctuation marks of 'Tweet text : <text> Label : '); "
    "label: its words + 1 end token"
)
TWITTER_COMPLAINTS = Path(__file__).parents[1] / "../shared/data/raft/twitter_complaints/train.csv"
_PIECE = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class TextLengths:
    """Tokens of the texts of a data set."""

    source: str
    rows: tuple[tuple[int, int], ...]  # tokens before the label, tokens of the label
    rule: str = RULE

    def sample(self, num_rows: int) -> tuple[tuple[int, int], ...]:
        """Rows that stand for the whole set: the middle of each of its equal parts by length.

        They come in the order of the data set.

        Raises:
            ValueError: more rows than there are.
        """
        count = len(self.rows)
        if num_rows > count:
            raise ValueError(f"{self.source} has {count} rows, got a batch of {num_rows}")
        by_length = sorted(range(count), key=lambda row: (sum(self.rows[row]), row))
        chosen = sorted(by_length[(2 * part + 1) * count // (2 * num_rows)] for part in range(num_rows))
        return tuple(self.rows[row] for row in chosen)


@dataclass(frozen=True)
class EvenLengths:
    """Lengths spread evenly over a range, for a case that declares one."""

    shortest: int
    longest: int
    labelled: float  # share of a row's tokens that are labels, at its end
    scale: int = 1  # divides lengths, to test the runner

    @property
    def source(self) -> str:
        """What the record says of the lengths."""
        return f"declared range: {self.shortest} to {self.longest} tokens, {self.labelled:.0%} of them labels"

    @property
    def rule(self) -> str:
        """How the rows are chosen."""
        return "the middle of each equal part of the range, in an order drawn from seed 0"

    def sample(self, num_rows: int) -> tuple[tuple[int, int], ...]:
        """(tokens before the label, tokens of the label) of each row; at least one token is a label."""
        span = self.longest - self.shortest
        totals = [self.shortest + span * (2 * part + 1) // (2 * num_rows) for part in range(num_rows)]
        Random(0).shuffle(totals)
        totals = [max(2, total // self.scale) for total in totals]
        labels = [max(1, round(self.labelled * total)) for total in totals]
        return tuple((total - label, label) for total, label in zip(totals, labels, strict=True))


def twitter_complaints(path: Path = TWITTER_COMPLAINTS) -> TextLengths:
    """Lengths of RAFT's twitter_complaints, 50 rows: from the file or, where it is not there, as recorded."""
    if not path.is_file():
        return TextLengths("recorded lengths of RAFT twitter_complaints (the file is not here)", RECORDED)
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(row["Tweet text"], row["Label"]) for row in csv.DictReader(file)]
    return TextLengths(
        "RAFT twitter_complaints, train.csv",
        tuple((_text_tokens(text), len(_PIECE.findall(label)) + 1) for text, label in rows),
    )


def _text_tokens(text: str) -> int:
    return math.ceil(TOKENS_PER_PIECE * len(_PIECE.findall(f"Tweet text : {text} Label : ")))


# fmt: off
RECORDED = (
    (17, 3), (39, 3), (52, 2), (32, 2), (19, 3), (53, 3), (49, 3), (33, 2), (47, 2), (27, 3),
    (13, 3), (32, 3), (62, 3), (50, 3), (28, 3), (29, 3), (20, 3), (29, 3), (47, 3), (37, 2),
    (38, 2), (30, 2), (48, 3), (32, 2), (29, 3), (48, 3), (23, 3), (50, 3), (19, 2), (28, 3),
    (22, 3), (32, 2), (33, 2), (32, 2), (35, 3), (19, 3), (37, 2), (23, 3), (17, 3), (33, 2),
    (28, 3), (14, 3), (29, 3), (34, 3), (28, 3), (39, 3), (12, 3), (25, 2), (32, 2), (37, 2),
)
# fmt: on
