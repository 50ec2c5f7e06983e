"""`python -m benchmarks tasks`: what soft prompts of real models reach on real tables.

A cell is one call of `softprompt train`: a model, a table, a setting, a seed and a fold. Its scores are
appended to a file as soon as it ends, so that hours of them can be measured in parts: what is in the file is
not measured again.

The tables are five of RAFT (Alex et al. 2021, 50 labelled rows each, measured by 5-fold cross-validation) and
`emotion` of TweetEval (3,257 rows for training and 1,421 for measuring).
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.real import TWEETS, RealError, train_metrics

Record = dict[str, Any]

RAFT = TWEETS.parents[1] / "raft"
FOLDS = 5
FOLDER = "tasks"
KEPT = (
    "train_rows",
    "eval_rows",
    "validation_rows",
    "num_virtual_tokens",
    "learning_rate",
    "steps",
    "best_step",
    "seconds",
    "labels",
    "eval_loss",
    "eval_exact_match",
    "eval_confusion",
    "train_exact_match",
    "zero_shot",
    "majority",
)


@dataclass(frozen=True)
class Source:
    """A real table: its folder, the columns of its texts and labels, and how many folds it is cut into.

    One without folds has a file of its own for measuring.
    """

    folder: Path
    text_column: str
    label_column: str
    folds: int


SOURCES = {
    "emotion": Source(TWEETS, "text", "label", 1),
    "ade_corpus_v2": Source(RAFT / "ade_corpus_v2", "Sentence", "Label", FOLDS),
    "overruling": Source(RAFT / "overruling", "Sentence", "Label", FOLDS),
    "semiconductor_org_types": Source(RAFT / "semiconductor_org_types", "Organization name", "Label", FOLDS),
    "terms_of_service": Source(RAFT / "terms_of_service", "Sentence", "Label", FOLDS),
    "twitter_complaints": Source(RAFT / "twitter_complaints", "Tweet text", "Label", FOLDS),
}
_TASK_TEXT = "Classify the text into one of the labels:"
# 50 epochs of a large table take days: as many rows as the defaults see.
_ARTICLE = ["--recipe", "article"]
SETTINGS: dict[str, list[str]] = {
    "defaults": [],
    "article": _ARTICLE,
    "ensemble": ["--ensemble", "5"],
    **{f"length {count}": ["--num-virtual-tokens", str(count)] for count in (1, 8, 20)},
    "start text": ["--init", "text", "--init-text", _TASK_TEXT],
    "start vocabulary": ["--init", "vocab"],
    "start random": ["--init", "random"],
}


@dataclass(frozen=True)
class Cell:
    """One training run."""

    table: str
    setting: str
    seed: int
    fold: int

    @property
    def options(self) -> list[str]:
        """Of `softprompt train`."""
        more = ["--steps", "300"] if self.setting == "article" and SOURCES[self.table].folds == 1 else []
        return [*SETTINGS[self.setting], *more, "--seed", str(self.seed)]


def cells_of(tables: Sequence[str], settings: Sequence[str], seeds: Sequence[int]) -> Iterator[Cell]:
    """Yield the cells, those that say something about all tables first."""
    for seed, setting, table in itertools.product(seeds, settings, tables):
        for fold in range(SOURCES[table].folds):
            yield Cell(table, setting, seed, fold)


def measure_cells(
    model: str, name: str, cells: Sequence[Cell], results: Path, *, minutes: float | None = None
) -> Path:
    """Train the cells that the file of a model lacks, and append each one's scores.

    Args:
        model: a folder or a .gguf file.
        name: of the file.
        cells: in the order in which they are trained.
        results: folder of the records.
        minutes: no further cell is begun after so many.

    Returns:
        The file: a JSON object for each cell.

    Raises:
        RealError: a table is not there, or a run ended early.
    """
    file = results / FOLDER / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {_cell_of(record) for record in read_cells(file)}
    begin = time.monotonic()
    for cell in cells:
        if cell in done:
            continue
        if minutes is not None and time.monotonic() - begin > 60 * minutes:
            break
        record = _measure(model, cell)
        with file.open("a", encoding="utf-8") as output:
            output.write(json.dumps(record, ensure_ascii=False) + "\n")
        print(f"{name}: {cell}: {record['eval_exact_match']:.1%} of {record['eval_rows']} rows", flush=True)
    return file


def read_cells(file: Path) -> list[Record]:
    """Return the records of a file, none where it is not there."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _cell_of(record: Record) -> Cell:
    return Cell(*(record[field] for field in ("table", "setting", "seed", "fold")))


def _measure(model: str, cell: Cell) -> Record:
    source = SOURCES[cell.table]
    with tempfile.TemporaryDirectory() as folder:
        data = _split(source, cell, Path(folder))
        columns = ["--text-column", source.text_column, "--label-column", source.label_column]
        metrics = train_metrics(model, [*data, *columns, *cell.options])
    entries = [entry["eval_seconds"] for entry in metrics["history"] if "eval_seconds" in entry]
    return {
        **vars(cell),
        "options": cell.options,
        **{field: metrics[field] for field in KEPT},
        "measuring_seconds": sum(entries),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "device": machine.describe_device("cpu"),
    }


def _split(source: Source, cell: Cell, folder: Path) -> list[str]:
    """The options that name the rows of a fold: every label is spread over all folds."""
    import pandas as pd

    train, test = source.folder / "train.csv", source.folder / "test.csv"
    if not train.is_file():
        raise RealError(f"{train} is not there")
    if source.folds == 1:
        return ["--data", str(train.resolve()), "--eval-data", str(test.resolve())]
    frame = pd.read_csv(train, dtype=str, keep_default_na=False)
    frame = frame.sample(frac=1, random_state=cell.seed)
    places = frame.sort_values(source.label_column, kind="stable").index
    held = set(places[cell.fold :: source.folds])
    parts = {"train.csv": ~frame.index.isin(held), "test.csv": frame.index.isin(held)}
    for name, rows in parts.items():
        frame[rows].to_csv(folder / name, index=False)
    return ["--data", str(folder / "train.csv"), "--eval-data", str(folder / "test.csv")]


# -------------------------------------------------------------------------------------------------- report
def tasks_page(results: Sequence[Path]) -> list[str]:
    """Return the parts of a page in Markdown: for each model what was measured of each table."""
    parts = []
    files = sorted(path for root in results for path in (root / FOLDER).glob("*.jsonl"))
    for file in files:
        records = read_cells(file)
        parts += [f"### {file.stem}", *_tables_of(records), _conditions(records)]
    return parts


def _tables_of(records: Sequence[Record]) -> list[str]:
    from benchmarks.tables import NOT_MEASURED, table

    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["table"], record["setting"]), []).append(record)
    names = [name for name in SOURCES if any(key[0] == name for key in groups)]
    settings = [name for name in SETTINGS if any(key[1] == name for key in groups)]
    header = ("table", "rows", "majority", "without a prompt", *settings)
    rows = []
    for name in names:
        own = [record for record in records if record["table"] == name]
        most, without = (_pooled(own, lambda record, kind=kind: record[kind]) for kind in KINDS)
        found = [groups.get((name, setting)) for setting in settings]
        shown = [NOT_MEASURED if group is None else _trained(group, SOURCES[name].folds) for group in found]
        rows.append((f"`{name}`", _rows_of(own), f"{most:.1%}", f"{without:.1%}", *shown))
    return [table(header, rows)]


KINDS = ("majority", "zero_shot")


def _pooled(records: Sequence[Record], scores: Any) -> float:
    """The accuracy over the rows of all folds, of seeds that were measured alike."""
    weights = [(scores(record)["exact_match"], record["eval_rows"]) for record in records]
    return sum(share * rows for share, rows in weights) / sum(rows for _, rows in weights)


def _rows_of(records: Sequence[Record]) -> str:
    first = records[0]
    total = first["train_rows"] + first["eval_rows"] + first["validation_rows"]
    folds = SOURCES[first["table"]].folds
    return f"{total:,}, {folds}-fold" if folds > 1 else f"{total:,}, {first['eval_rows']:,} to measure"


def _trained(records: Sequence[Record], folds: int) -> str:
    """Accuracy and macro-F1 over all folds: the mean over the seeds, and how far they are apart."""
    seeds: dict[int, list[Record]] = {}
    for record in records:
        seeds.setdefault(record["seed"], []).append(record)
    each = [_accuracy_and_f1(_confusion(group)) for group in seeds.values()]
    accuracies, scores = zip(*each, strict=True)
    text = f"{sum(accuracies) / len(each):.1%} ({sum(scores) / len(each):.2f})"
    if len(each) > 1:
        text += f", {len(each)} seeds {min(accuracies):.1%} to {max(accuracies):.1%}"
    parts, wanted = len(records), folds * len(seeds)
    return text if parts == wanted else f"{text}, {parts} of {wanted} folds"


def _confusion(records: Sequence[Record]) -> list[list[int]]:
    """The sum over the folds; a fold whose training rows lack a label has no row for it."""
    labels = sorted({label for record in records for label in record["labels"]})
    total = [[0] * len(labels) for _ in labels]
    for record in records:
        places = [labels.index(label) for label in record["labels"]]
        for row, counts in zip(places, record["eval_confusion"], strict=True):
            for column, count in zip(places, counts, strict=True):
                total[row][column] += count
    return total


def _accuracy_and_f1(confusion: Sequence[Sequence[int]]) -> tuple[float, float]:
    from softprompt.tasks.metrics import accuracy_and_f1

    pairs = [
        (str(column), str(row))
        for row, counts in enumerate(confusion)
        for column, count in enumerate(counts)
        for _ in range(count)
    ]
    predicted, expected = zip(*pairs, strict=True)
    return accuracy_and_f1(predicted, expected)


def _conditions(records: Sequence[Record]) -> str:
    devices = sorted({_device_of(record["device"]) for record in records})
    hours = sum(record["seconds"] for record in records) / 3600
    return f"{len(records)} runs, {hours:.1f} hours, on {'; '.join(devices)}."


def _device_of(device: Record) -> str:
    return f"{device['name']}, {device['cores']} cores" if "cores" in device else str(device["name"])
