"""Labels for new rows by likelihood: `softprompt predict --score`, and the prediction of an ensemble."""

import argparse
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from softprompt.cli.errors import UsageError
from softprompt.cli.table_options import table_arguments
from softprompt.files import write_text
from softprompt.tasks.classification import ClassificationTask, Encoder
from softprompt.tasks.errors import TaskError
from softprompt.tasks.metrics import confusion_counts, exact_match, macro_f1, to_json
from softprompt.tasks.plot import draw_confusion
from softprompt.tasks.scoring import (
    content_free_log_likelihoods,
    label_log_likelihoods,
    label_probabilities,
)
from softprompt.tasks.table import Table, read_table, with_known_labels
from softprompt.tasks.written import write_frame


def check_outputs(args: argparse.Namespace, task: ClassificationTask, table: Table) -> None:
    """Raise UsageError where a column or a file that scoring writes is there already, or would be twice."""
    for column in map(probability_column, map(task.name_of, task.labels)):
        if column == args.output_column:
            raise UsageError(f"--output-column {column} is the column of a probability: give another name")
        if column in table.frame.columns:
            raise UsageError(f"{args.data} has a column {column!r} already: rename it")
    for path in (_metrics_file(args), _confusion_file(args)):
        if path.exists() and not args.overwrite:
            raise UsageError(f"{path} exists already: name another --output or replace it with --overwrite")


def probability_column(label: str) -> str:
    """Return the name of the column with the probabilities of a label."""
    return f"p({label})"


def read_labels(args: argparse.Namespace, task: ClassificationTask, table: Table) -> list[str] | None:
    """Return the names of the true labels of the rows, None where the table has none.

    Without `--label-column` the column of the training is used if it is there and holds known labels only.
    """
    asked = args.label_column is not None
    column = args.label_column if asked else task.label_column
    if not asked and (column not in table.frame.columns or column == table.text_column):
        return None
    try:
        labelled = read_table(
            args.data, table.text_column, column, every_line=True, **table_arguments(args, [args.data])
        )
        labelled = with_known_labels(labelled, task.labels, dict(task.label_names))
    except TaskError as error:
        if asked:
            raise
        print(f"nothing is measured: {error}")
        return None
    return [task.name_of(label) for label in labelled.labels or []]


def score_table(
    args: argparse.Namespace,
    model: Any,
    encoder: Encoder,
    table: Table,
    *,
    adapters: list[str],
) -> int:
    """Score every label of every row, write the table, and measure where the table has labels."""
    from softprompt.ensemble import combine

    labels = read_labels(args, encoder.task, table)
    start = time.perf_counter()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("scoring", total=len(table))
        logs = label_log_likelihoods(
            model,
            encoder,
            table.rows,
            adapters=adapters,
            batch_size=args.batch_size,
            progress=lambda rows: progress.update(bar, advance=rows),
        )
    content_free = content_free_log_likelihoods(model, encoder, adapters=adapters) if args.calibrate else None
    lengths = (
        [len(encoder.targets[label]) for label in encoder.task.labels] if args.length_normalise else None
    )
    each = label_probabilities(logs, lengths=lengths, content_free=content_free)
    chosen, shares = combine(each, args.combine or "vote")
    names = tuple(map(encoder.task.name_of, encoder.task.labels))
    predicted = [names[number] for number in chosen.tolist()]
    columns = {args.output_column: predicted}
    columns |= {probability_column(name): shares[:, i].tolist() for i, name in enumerate(names)}
    write_frame(table.frame.assign(**columns), args.output)
    print(f"{len(predicted)} rows scored in {time.perf_counter() - start:.1f} s: {args.output}")
    if labels is None:
        for path in (_metrics_file(args), _confusion_file(args)):
            path.unlink(missing_ok=True)  # with --overwrite, of the table that was replaced
    else:
        _measure(args, names, predicted, labels)
    return 0


def _measure(
    args: argparse.Namespace, names: tuple[str, ...], predicted: list[str], labels: list[str]
) -> None:
    counts = confusion_counts(predicted, labels, names)
    metrics = {
        "rows": len(labels),
        "accuracy": exact_match(predicted, labels),
        "macro_f1": macro_f1(counts),
        "labels": list(names),
        "confusion": counts,
    }
    write_text(_metrics_file(args), to_json(metrics))
    title = f"Accuracy {metrics['accuracy']:.1%}, macro-F1 {metrics['macro_f1']:.3f}"
    draw_confusion(counts, names, _confusion_file(args), title=title)
    print(f"accuracy {metrics['accuracy']:.1%}, macro-F1 {metrics['macro_f1']:.3f}: {_metrics_file(args)}")
    print(f"which label was taken for which: {_confusion_file(args)}")


def _metrics_file(args: argparse.Namespace) -> Path:
    return Path(args.output).with_suffix(".metrics.json")


def _confusion_file(args: argparse.Namespace) -> Path:
    return Path(args.output).with_suffix(".confusion.png")
