"""Tables of texts and labels: reading, checking and splitting."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from softprompt.tasks.errors import TaskError
from softprompt.tasks.frames import Reading, Source, quoted, read_source
from softprompt.tasks.labels import clean_label, label_words, look_of, whole_number
from softprompt.tasks.template import TEXT, Row
from softprompt.tasks.written import is_missing

_NO_TEXT = (dict, list, tuple, bytes, np.ndarray)


@dataclass(frozen=True)
class Table:
    """Rows of text, with their labels where a label column was asked for.

    Attributes:
        source: the file or data set.
        text_column: column of the texts.
        label_column: column of the labels.
        texts: one of each row.
        labels: one of each row, as a model writes it; None for a table read without a label column.
        frame: every row as it was read, with all of its columns.
        others: the cells of the other columns that were asked for, "" where one is missing.
        label_names: what the labels are called in the table, where a model writes them otherwise.
        notes: what is to be said of the source: of lines and rows that were left out, and of other sheets.
        skipped: rows of `frame` that are not in the table, because their text or label is empty.
    """

    source: str
    text_column: str
    label_column: str | None
    texts: list[str]
    labels: list[str] | None
    frame: Any = field(repr=False, compare=False)
    others: dict[str, list[str]] = field(default_factory=dict)
    label_names: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    skipped: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def rows(self) -> Sequence[Row]:
        """What fills a template: the texts, with the cells of the other columns where there are some."""
        if not self.others:
            return self.texts
        names = [TEXT, *self.others]
        rows = zip(self.texts, *self.others.values(), strict=True)
        return [dict(zip(names, cells, strict=True)) for cells in rows]

    @property
    def index(self) -> list[int]:
        """The row of `frame` that each text is in."""
        return [row for row in range(len(self.frame)) if row not in self.skipped]

    def frame_with(self, columns: Mapping[str, Sequence[Any]]) -> Any:
        """Return `frame` and further columns: the value of each text, and None in rows that were skipped."""
        index, rows = self.index, range(len(self.frame))
        added = {}
        for name, values in columns.items():
            of_row = dict(zip(index, values, strict=True))
            added[name] = [of_row.get(row) for row in rows]
        return pd.concat([self.frame, pd.DataFrame(added, index=self.frame.index)], axis=1)

    def take(self, indices: Sequence[int]) -> "Table":
        """Return the rows at `indices`, in that order."""
        index = self.index
        return replace(
            self,
            texts=[self.texts[i] for i in indices],
            labels=None if self.labels is None else [self.labels[i] for i in indices],
            frame=self.frame.iloc[[index[i] for i in indices]].reset_index(drop=True),
            others={name: [cells[i] for i in indices] for name, cells in self.others.items()},
            skipped=frozenset(),
        )

    def known_labels(self) -> tuple[str, ...]:
        """Return the distinct labels, sorted."""
        return tuple(sorted(set(self.labels or [])))


def read_table(
    source: str | Path,
    text_column: str,
    label_column: str | None = None,
    *,
    columns: Sequence[str] = (),
    every_line: bool = False,
    skip_empty: bool = False,
    **reading: Any,
) -> Table:
    """Read a table of texts and, where `label_column` is given, of labels.

    `source` is a table file, a folder that `datasets` can load, or the name of a data set. Cells become
    strings. Labels lose the spaces and the characters without width around them; the names of a
    `datasets.ClassLabel` are written with their underscores as spaces, and whole numbers of a column of
    floats as a person writes them, "1" (`Table.label_names` has the names, and "1.0").

    Args:
        source: see above.
        text_column: column of the texts.
        label_column: column of the labels.
        columns: other columns that a template reads.
        every_line: refuse blank lines between the rows of a file, which are left out otherwise: for tables
            whose lines have to stand beside those of another file.
        skip_empty: leave rows without a text or a label out of the table, though not out of its frame.
        reading: what `Reading` has.

    Raises:
        TaskError: the source does not exist, is of an unknown type, cannot be read or has no rows; a column
            is missing, there twice or asked for twice; rows have more cells than the header; a text or a
            label is empty or no text (the row is named, counted from 1 without the header), or all are.
    """
    if label_column == text_column:
        raise TaskError(f"column {text_column!r} cannot be both the text and the label: name two columns")
    found = read_source(source, Reading(**reading))
    if every_line and found.blank_lines:
        lines = ", ".join(map(str, found.blank_lines[:5])) + (", ..." if len(found.blank_lines) > 5 else "")
        raise TaskError(
            f"{source} has empty lines between its rows (line {lines}), which have no text to label, and "
            "without them the rows of the output would not be the lines of the table: fill them in or remove "
            "them"
        )
    notes = [found.note] if found.note else []
    if found.blank_lines:
        notes.append(f"blank lines between rows were left out: {len(found.blank_lines):,}")
    empty: set[int] | None = set() if skip_empty else None
    texts = _cells(found, text_column, "text", str(source), empty)
    labels, label_names = None, dict[str, str]()
    if label_column is not None:
        cells = [clean_label(cell) for cell in _cells(found, label_column, "label", str(source), empty)]
        words = _words(found, label_column)
        labels, there = [words.get(cell, cell) for cell in cells], set(cells)
        # Where some cells have the word itself, it is the table's own, too.
        label_names = {word: name for name, word in words.items() if word != name and word not in there}
    skipped = frozenset(empty or ())
    needed = "a text" if label_column is None else "a text and a label"
    if len(skipped) == len(texts):
        columns = repr(text_column)
        columns += "" if label_column is None else f", and the label in {label_column!r}"
        raise TaskError(f"{source} has no row with {needed}: is the text in column {columns}?")
    if skipped:
        notes.append(f"rows without {needed} were skipped: {len(skipped):,}")

    def kept(cells: list[str]) -> list[str]:
        return [cell for row, cell in enumerate(cells) if row not in skipped]

    return Table(
        source=str(source),
        text_column=text_column,
        label_column=label_column,
        texts=kept(texts),
        labels=None if labels is None else kept(labels),
        frame=found.frame,
        others={name: kept(_cells(found, name, "column", str(source))) for name in columns},
        label_names=label_names,
        notes=tuple(notes),
        skipped=skipped,
    )


def split_table(table: Table, share: float, seed: int, *, by_label: bool = True) -> tuple[Table, Table]:
    """Split off a seeded share: `round(share * rows)` of every label, but never all of its rows.

    Without `by_label` the share is of all rows, whatever stands in the label column.

    Returns (rest, split off), each in the order of the table.

    Raises:
        TaskError: no label has enough rows to give one away.
    """
    generator = random.Random(seed)
    chosen: set[int] = set()
    groups = [list(range(len(table)))]
    if by_label:
        of_label: dict[str, list[int]] = {label: [] for label in table.known_labels()}
        for i, label in enumerate(table.labels or []):
            of_label[label].append(i)
        groups = list(of_label.values())
    for rows in groups:
        generator.shuffle(rows)
        chosen.update(rows[: min(round(share * len(rows)), len(rows) - 1)])
    if not chosen:
        raise TaskError(
            f"{table.source} has too few rows ({len(table)}) to split off {share:g} of them for evaluation: "
            "give an evaluation table, a larger share, or the share 0 to train without evaluation"
        )
    rest = [i for i in range(len(table)) if i not in chosen]
    return table.take(rest), table.take(sorted(chosen))


def balanced_rows(table: Table) -> Table:
    """Return the table with rows of rarer labels again, until every label has as many as the most frequent.

    No row is there twice before each of its label is there once.
    """
    labels = table.labels or []
    places: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        places.setdefault(label, []).append(row)
    most = max(map(len, places.values()))
    more = [own[i % len(own)] for own in places.values() for i in range(len(own), most)]
    return table.take([*range(len(table)), *more])


def sample_rows(table: Table, count: int, seed: int) -> Table:
    """Return `count` random rows in the order of the table, or the table where it has no more."""
    if len(table) <= count:
        return table
    return table.take(sorted(random.Random(seed).sample(range(len(table)), count)))


def check_several_labels(table: Table) -> None:
    """Raise TaskError where all rows of a training table have one label, which teaches nothing."""
    known = table.known_labels()
    if len(known) < 2:
        raise TaskError(
            f"{table.source} has the label {quoted(known)} in all {len(table)} rows: a prompt learns to tell "
            f"labels apart, so give rows of at least two (is {table.label_column!r} the right label column?)"
        )


def check_labels_known(table: Table, known: Sequence[str]) -> None:
    """Raise TaskError naming the first row of `table` whose label is not among `known`."""
    for row, label in zip(table.index, table.labels or [], strict=False):
        if label not in known:
            alike = [other for other in known if look_of(other) == look_of(label)]
            like = f"; it differs from {quoted(alike)} in case, spaces or number form alone" if alike else ""
            raise TaskError(
                f"{table.source}: row {row + 1} has the label {label!r}, which no training row has "
                f"(known: {quoted(known)}{like}): correct it or add training rows with it"
            )


def with_words(table: Table, label_map: Sequence[tuple[str, str]]) -> Table:
    """Return a training table with other words for some labels; `label_names` has what the table calls them.

    Args:
        table: with labels.
        label_map: (label, words): a label, as it was read or as the table calls it, and what to learn
            instead.

    Raises:
        TaskError: the table has no such label, two labels would be one, or a label is there twice.
    """
    known, chosen = table.known_labels(), dict[str, str]()
    names = {label: table.label_names.get(label, label) for label in known}
    label_of = {name: label for label, name in names.items()} | {label: label for label in known}
    for given, words in label_map:
        option = f"--label-map {given}={words}"
        if given not in label_of:
            raise TaskError(f"{option}: {table.source} has no such label; its labels are {quoted(known)}")
        if label_of[given] in chosen:
            raise TaskError(f"{option}: the label has words already, {chosen[label_of[given]]!r}: give one")
        if words in chosen.values():
            raise TaskError(f"{option}: another label has these words: two labels would be one")
        chosen[label_of[given]] = words
    kept = [label for label in known if label not in chosen]
    for label, words in chosen.items():
        if words in kept or words in [names[other] for other in kept]:
            raise TaskError(
                f"--label-map {label}={words}: {table.source} has a label {words!r}, and two labels would be "
                "one: name other words, or words for that label, too"
            )
    called = {chosen.get(label, label): name for label, name in names.items()}
    return replace(
        table,
        labels=[chosen.get(label, label) for label in table.labels or []],
        label_names={label: name for label, name in called.items() if label != name},
    )


def with_known_labels(table: Table, known: Sequence[str], names: Mapping[str, str]) -> Table:
    """Return the table with its labels as training has them.

    Training may have got words for the names of classes or for any labels, or names from where this table has
    words: `names` is what the table of the training called the known labels where it called them otherwise. A
    label is taken for what that table called so, be it written as another form of a number, before it is
    taken for one that was learnt, because the words of one label may be another one's name.

    Raises:
        TaskError: a row has a label that training does not know.
    """
    called = {names.get(label, label): label for label in known}
    numbers = {whole_number(name): label for label, name in names.items()}

    def recognised(label: str) -> str:
        own = table.label_names.get(label, label)
        found = (called.get(label), called.get(own), numbers.get(whole_number(label)))
        written = (form for form in (label, own) if form in known)
        return next((form for form in (*found, *written) if form is not None), label)

    labels = [recognised(label) for label in table.labels or []]
    found = replace(table, labels=labels)
    check_labels_known(found, known)
    return found


def _words(found: Source, column: str) -> dict[str, str]:
    """Return what is learnt for labels that are called otherwise in a table."""
    # A column of integers with gaps is one of floats in pandas, and in what it wrote.
    floats = {str(cell) for cell in found.frame[column].tolist() if isinstance(cell, float)}
    numbers = {cell: whole_number(cell) for cell in floats}
    return label_words(found.class_names.get(column, [])) | numbers


def _cells(found: Source, column: str, kind: str, source: str, empty: set[int] | None = None) -> list[str]:
    """Return a column as strings.

    Only one of the kind "column" may have empty cells, unless the rows of others are to be added to `empty`.
    """
    frame = found.frame
    if column not in frame.columns:
        there = f"{source} has no column {column!r}; its columns are {quoted(list(frame.columns))}"
        if kind != "column":
            raise TaskError(f"{there}: {found.hint or f'name one of them as the {kind} column'}")
        brace = f"write {{{{{column}}}}} for these words in braces"
        advice = "leave it out, the label is written behind the template" if column == "label" else brace
        remedy = found.hint or f"add the column, correct its name, or {advice}"
        raise TaskError(f"{there}, but the template reads {{{column}}}: {remedy}")
    values = frame[column].tolist()
    cells = ["" if is_missing(value) else str(value) for value in values]
    for row, (value, cell) in enumerate(zip(values, cells, strict=True), start=1):
        place = f"{source}: row {row} (counted from 1, without the header)"
        if kind != "column" and not (clean_label(cell) if kind == "label" else cell.strip()):
            if empty is None:
                raise TaskError(
                    f"{place} has an empty {kind} in column {column!r}: fill it in, remove the row, or give "
                    "--skip-empty"
                )
            empty.add(row - 1)
        if isinstance(value, _NO_TEXT):
            raise TaskError(
                f"{place} has a {type(value).__name__} in column {column!r}, expected a "
                f"{'text' if kind == 'column' else kind}: name another column or make texts of them"
            )
        if not _is_unicode(cell):
            raise TaskError(
                f"{place} has a {'text' if kind == 'column' else kind} in column {column!r} that is no valid "
                "Unicode (half of a surrogate pair): correct it"
            )
    return cells


def _is_unicode(cell: str) -> bool:
    try:
        cell.encode()
    except UnicodeEncodeError:
        return False
    return True
