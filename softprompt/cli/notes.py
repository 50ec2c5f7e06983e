"""What the commands say of the rows that they were given: counts, and what may not be as it was meant."""

import sys
from collections import Counter
from collections.abc import Sequence

from softprompt.cli.inputs import Setup
from softprompt.tasks.classification import Encoder
from softprompt.tasks.labels import evaluation_notes, label_counts, look_alikes
from softprompt.tasks.table import Table


def say_rows(setup: Setup) -> None:
    """Print how many rows each label has, and the notes on the tables of a training run."""
    encoder, train_table = setup.encoder, setup.train_table
    kept = {"evaluation": setup.eval_table, "validation": setup.validation_table}
    used = {use: table for use, table in kept.items() if table is not None}
    tables = [train_table, *used.values()]
    others = {f"for {use}": table.labels or [] for use, table in used.items()}
    lines = [f"{sum(map(len, tables)):,} rows: {label_counts(train_table.labels or [], others)}"]
    lines += look_alikes([label for table in tables for label in table.labels or []])
    for use, table in used.items():
        lines += evaluation_notes(encoder.task.labels, table.labels or [], use)
    lines += row_notes(tables)
    lines += length_notes(encoder, tables, "a larger --max-length keeps it")
    say(lines)


def row_notes(tables: Sequence[Table]) -> list[str]:
    """Return what is to be said of lines and cells without content."""
    lines = {table.source: table.blank_lines for table in tables if table.blank_lines}
    notes = [
        f"{source}: blank lines between rows were left out: {count:,}" for source, count in lines.items()
    ]
    empty: Counter[str] = Counter()
    for table in tables:
        for name, cells in table.others.items():
            empty[name] += sum(not cell.strip() for cell in cells)
    return notes + [
        f"rows with nothing in column {name!r}, which the template reads: {count:,}"
        for name, count in empty.items()
        if count
    ]


def length_notes(encoder: Encoder, tables: Sequence[Table], advice: str) -> list[str]:
    """Return how many rows do not fit, so that something of them is not seen."""
    lengths = [length for table in tables for length in encoder.lengths(table.rows)]
    cut = sum(length > encoder.max_prompt for length in lengths)
    if not cut:
        return []
    longest = max(lengths) + encoder.max_target
    return [
        f"{cut:,} of {len(lengths):,} rows are longer than the {encoder.task.max_length} tokens of "
        f"--max-length and lose the end of their text (the longest has {longest:,} with its label): {advice}"
    ]


def say(lines: Sequence[str]) -> None:
    """Print notes beside the results of a command."""
    for line in lines:
        print(f"softprompt: {' '.join(line.split())}", file=sys.stderr)
