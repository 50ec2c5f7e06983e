"""Labels for new rows by likelihood, and what is measured where a table has labels or targets."""

import time
from pathlib import Path
from typing import Any

from softprompt.cli.checks import UsageError, check_new
from softprompt.cli.predict_config import PredictConfig
from softprompt.cli.progress import progress_bar
from softprompt.ensemble import combine
from softprompt.files import write_text
from softprompt.tasks.classification import Encoder, TextTask
from softprompt.tasks.errors import TaskError
from softprompt.tasks.folders import adapter_folders
from softprompt.tasks.metrics import accuracy_and_f1, confusion_counts, text_scores, to_json
from softprompt.tasks.plot import draw_confusion
from softprompt.tasks.scoring import (
    content_free_log_likelihoods,
    label_log_likelihoods,
    label_probabilities,
)
from softprompt.tasks.table import Table, read_table, with_known_labels
from softprompt.tasks.written import write_frame


def check_outputs(config: PredictConfig, task: TextTask, table: Table) -> None:
    """Raise UsageError where a column or a file that scoring writes is there already, or would be twice."""
    columns = map(probability_column, map(task.name_of, task.labels)) if _with_probabilities(config) else ()
    for column in columns:
        if column == config.output_column:
            raise UsageError(f"--output-column {column} is the column of a probability: give another name")
        if column in table.frame.columns:
            raise UsageError(f"{config.data} has a column {column!r} already: rename it")
    for path in _measured_files(config, task):
        check_new(path, overwrite=config.overwrite)


def _with_probabilities(config: PredictConfig) -> bool:
    return config.score or len(adapter_folders(Path(config.adapter))) > 1


def probability_column(label: str) -> str:
    """Return the name of the column with the probabilities of a label."""
    return f"p({label})"


def read_labels(config: PredictConfig, task: TextTask, table: Table) -> dict[int, str] | None:
    """Return the names of the true labels, or the targets, by the rows of the table's frame.

    None where the table has none; with `--skip-empty`, rows with an empty one are missing. Without
    `--label-column` the column of the training is used if it is there and holds known labels only.
    """
    asked = config.label_column is not None
    column = config.label_column or task.label_column
    if not asked and (column not in table.frame.columns or column == table.text_column):
        return None
    try:
        reading = config.table.reading([config.data])
        labelled = read_table(config.data, table.text_column, column, every_line=True, **reading)
        if not task.generates:
            labelled = with_known_labels(labelled, task.labels, dict(task.label_names))
    except TaskError as error:
        if asked:
            raise
        print(f"nothing is measured: {error}")
        return None
    return dict(zip(labelled.index, map(task.name_of, labelled.labels or []), strict=True))


def score_table(config: PredictConfig, model: Any, encoder: Encoder, table: Table) -> None:
    """Score every label of every row with all adapters, write the table, and measure where it has labels."""
    task, adapters = encoder.task, list(model.peft_config)
    labels = read_labels(config, task, table)
    start = time.perf_counter()
    with progress_bar("scoring", len(table)) as advance:
        logs = label_log_likelihoods(
            model,
            encoder,
            table.rows,
            adapters=adapters,
            batch_size=config.compute.batch_size,
            progress=advance,
        )
    content_free = (
        content_free_log_likelihoods(model, encoder, adapters=adapters) if config.calibrate else None
    )
    lengths = [len(encoder.targets[label]) for label in task.labels] if config.length_normalise else None
    each = label_probabilities(logs, lengths=lengths, content_free=content_free)
    chosen, shares = combine(each, config.combine or "vote")
    names = tuple(map(task.name_of, task.labels))
    predicted = [names[number] for number in chosen.tolist()]
    columns: dict[str, list[Any]] = {config.output_column: predicted}
    if _with_probabilities(config):
        columns |= {probability_column(name): shares[:, i].tolist() for i, name in enumerate(names)}
    write_frame(table.frame_with(columns), config.output)
    print(f"{len(predicted)} rows labelled in {time.perf_counter() - start:.1f} s: {config.output}")
    if labels is None:
        remove_measured(config, task)
        return
    predicted, expected = _measured_rows(table, predicted, labels)
    counts = confusion_counts(predicted, expected, names)
    accuracy, f1 = accuracy_and_f1(predicted, expected)
    metrics = {
        "rows": len(labels),
        "accuracy": accuracy,
        "macro_f1": f1,
        "labels": list(names),
        "confusion": counts,
    }
    metrics_file, confusion_file = _measured_files(config, task)
    write_text(metrics_file, to_json(metrics))
    draw_confusion(counts, names, confusion_file, title=f"Accuracy {accuracy:.1%}, macro-F1 {f1:.3f}")
    print(f"accuracy {accuracy:.1%}, macro-F1 {f1:.3f}{_of_rows(table, labels)}: {metrics_file}")
    print(f"which label was taken for which: {confusion_file}")


def measure_texts(config: PredictConfig, task: TextTask, table: Table, texts: list[str]) -> None:
    """Compare what was written for the rows of a table with its targets, where it has them."""
    targets = read_labels(config, task, table)
    if targets is None:
        remove_measured(config, task)
        return
    scores = text_scores(*_measured_rows(table, texts, targets))
    (metrics_file,) = _measured_files(config, task)
    write_text(metrics_file, to_json({"rows": len(targets), **scores}))
    near = f"ROUGE-L {scores['rouge_l']:.3f}, BLEU {scores['bleu']:.1f}"
    print(f"exact match {scores['exact_match']:.1%}, {near}{_of_rows(table, targets)}: {metrics_file}")


def _measured_rows(table: Table, predicted: list[str], labels: dict[int, str]) -> tuple[list[str], list[str]]:
    """Return what was predicted for the rows that have a label, and their labels."""
    of_row = dict(zip(table.index, predicted, strict=True))
    return [of_row[row] for row in labels], list(labels.values())


def _of_rows(table: Table, labels: dict[int, str]) -> str:
    return "" if len(labels) == len(table.frame) else f" of the {len(labels):,} rows with text and label"


def _measured_files(config: PredictConfig, task: TextTask) -> list[Path]:
    """The files beside the output: the scores, and of labels the figure of which was taken for which."""
    endings = (".metrics.json",) if task.generates else (".metrics.json", ".confusion.png")
    return [Path(config.output).with_suffix(ending) for ending in endings]


def remove_measured(config: PredictConfig, task: TextTask) -> None:
    """Remove, with `--overwrite`, what was measured of the table that was replaced."""
    for path in _measured_files(config, task):
        path.unlink(missing_ok=True)
