"""Tables of texts and labels: reading, checking, splitting and writing."""

import json
import os
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from softprompt.files import whole_file
from softprompt.tasks.errors import TaskError

FILE_TYPES = (".csv", ".jsonl", ".parquet")
_NO_TEXT = (dict, list, tuple, bytes, np.ndarray)


@dataclass(frozen=True)
class Table:
    """Rows of text, with their labels where a label column was asked for.

    `labels` is None for a table read without a label column. `frame` holds every column as it was read.
    """

    source: str
    text_column: str
    label_column: str | None
    texts: list[str]
    labels: list[str] | None
    frame: Any = field(repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> "Table":
        """Return the rows at `indices`, in that order."""
        return Table(
            source=self.source,
            text_column=self.text_column,
            label_column=self.label_column,
            texts=[self.texts[i] for i in indices],
            labels=None if self.labels is None else [self.labels[i] for i in indices],
            frame=self.frame.iloc[list(indices)].reset_index(drop=True),
        )

    def known_labels(self) -> tuple[str, ...]:
        """Return the distinct labels, sorted."""
        return tuple(sorted(set(self.labels or [])))


def read_table(
    source: str | Path,
    text_column: str,
    label_column: str | None = None,
    *,
    subset: str | None = None,
    split: str = "train",
) -> Table:
    """Read a table of texts and, where `label_column` is given, of labels.

    `source` is a `.csv`, `.jsonl` or `.parquet` file, a folder that `datasets` can load, or the name of a
    data set; `subset` and `split` choose among the parts of a data set. Cells become strings; the names of a
    `datasets.ClassLabel` are used with their underscores as spaces.

    Raises:
        TaskError: the source does not exist, is of an unknown type, cannot be read or has no rows; a column
            is missing, there twice or asked for twice; rows have more cells than the header; a text or a
            label is empty or no text (the row is named, counted from 1 without the header).
    """
    if label_column == text_column:
        raise TaskError(f"column {text_column!r} cannot be both the text and the label: name two columns")
    frame = read_frame(source, subset=subset, split=split)
    texts = _text_cells(frame, text_column, "text", str(source))
    labels = None if label_column is None else _text_cells(frame, label_column, "label", str(source))
    return Table(str(source), text_column, label_column, texts, labels, frame)


def read_frame(source: str | Path, *, subset: str | None = None, split: str = "train") -> Any:
    """Read every column of `source` into a pandas data frame (see `read_table`)."""
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in FILE_TYPES:
            raise TaskError(
                f"{source} is of the unknown type {suffix!r}: give one of {', '.join(FILE_TYPES)}"
            )
        try:
            frame = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": pd.read_parquet}[suffix](path)
        except TaskError:
            raise
        except (OSError, ValueError, pd.errors.ParserError) as error:
            raise TaskError(f"{source} is not a readable {suffix} table: {_first_line(error)}") from error
    elif path.is_dir() or not _is_file_name(str(source)):
        frame = _read_dataset(str(source), subset, split)
    else:
        raise TaskError(f"{source} does not exist: check the path of the table")
    if len(frame) == 0:
        raise TaskError(f"{source} has no rows: give a table with at least one")
    return frame


def write_frame(frame: Any, path: str | Path) -> None:
    """Write a data frame as CSV, JSONL or Parquet by the extension; no half-written file is ever left."""
    path = Path(path)
    check_writable_type(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    with whole_file(path) as partial:
        if suffix == ".csv":
            frame.to_csv(partial, index=False)
        elif suffix == ".jsonl":
            frame.to_json(partial, orient="records", lines=True, force_ascii=False)
        else:
            frame.to_parquet(partial, index=False)


def check_writable_type(path: str | Path) -> None:
    """Raise TaskError unless the extension of `path` is one that `write_frame` can write."""
    suffix = Path(path).suffix.lower()
    if suffix not in FILE_TYPES:
        raise TaskError(f"cannot write {path}: its type {suffix!r} is not one of {', '.join(FILE_TYPES)}")


def split_table(table: Table, share: float, seed: int) -> tuple[Table, Table]:
    """Split off a seeded, stratified share: `round(share * rows)` of every label, but never all of its rows.

    Returns (rest, split off), each in the order of the table.

    Raises:
        TaskError: no label has enough rows to give one away.
    """
    generator = random.Random(seed)
    chosen: set[int] = set()
    for label in table.known_labels():
        rows = [i for i, value in enumerate(table.labels or []) if value == label]
        generator.shuffle(rows)
        chosen.update(rows[: min(round(share * len(rows)), len(rows) - 1)])
    if not chosen:
        raise TaskError(
            f"{table.source} has too few rows ({len(table)}) to split off {share:g} of them for evaluation: "
            "give an evaluation table, a larger share, or the share 0 to train without evaluation"
        )
    rest = [i for i in range(len(table)) if i not in chosen]
    return table.take(rest), table.take(sorted(chosen))


def check_labels_known(table: Table, known: Sequence[str]) -> None:
    """Raise TaskError naming the first row of `table` whose label is not among `known`."""
    for row, label in enumerate(table.labels or [], start=1):
        if label not in known:
            raise TaskError(
                f"{table.source}: row {row} has the label {label!r}, which no training row has "
                f"(known: {_quoted(known)}): correct it or add training rows with it"
            )


def _read_csv(path: Path) -> Any:
    # Without index_col=False pandas drops the first cells of rows that are longer than the header.
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    try:
        header = pd.read_csv(path, header=None, nrows=1, **options)
        _check_columns(path, header.iloc[0].tolist())
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(path, index_col=False, **options)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except pd.errors.ParserWarning as error:
        raise TaskError(
            f"{path} has rows with more cells than its header has columns: put texts with commas into "
            "quotation marks"
        ) from error


def _check_columns(path: Path, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise TaskError(
            f"{path} has several columns of the name {_quoted(twice)}: rename all but one of them"
        )


def _read_jsonl(path: Path) -> Any:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise TaskError(
                f"{path}: line {number} is not JSON ({error}): write one object a line"
            ) from error
        if not isinstance(row, dict):
            raise TaskError(f"{path}: line {number} is not a JSON object: write one object a line")
        rows.append(row)
    return pd.DataFrame(rows, dtype=object)


def _read_dataset(source: str, subset: str | None, split: str) -> Any:
    import datasets

    folder = Path(source)
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    try:
        loaded = datasets.load_from_disk(source) if saved else datasets.load_dataset(source, subset)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise TaskError(
            f"{source} is neither a table file nor a data set that can be loaded ({_first_line(error)}): "
            "check the name or the path"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise TaskError(f"{source} has no split {split!r}: name one of {_quoted(list(loaded))}")
        loaded = loaded[split]
    frame = loaded.to_pandas()
    for name, feature in loaded.features.items():
        if isinstance(feature, datasets.ClassLabel):
            names = [class_name.replace("_", " ") for class_name in feature.names]
            frame[name] = [names[i] if i is not None and i >= 0 else None for i in loaded[name]]
    return frame


def _text_cells(frame: Any, column: str, kind: str, source: str) -> list[str]:
    if column not in frame.columns:
        raise TaskError(
            f"{source} has no column {column!r}; its columns are {_quoted(list(frame.columns))}: "
            f"name one of them as the {kind} column"
        )
    values = frame[column].tolist()
    cells = ["" if _is_missing(value) else str(value) for value in values]
    for row, (value, cell) in enumerate(zip(values, cells, strict=True), start=1):
        place = f"{source}: row {row} (counted from 1, without the header)"
        if not cell.strip():
            raise TaskError(f"{place} has an empty {kind} in column {column!r}: fill it in or remove the row")
        if isinstance(value, _NO_TEXT):
            raise TaskError(
                f"{place} has a {type(value).__name__} in column {column!r}, expected a {kind}: name another "
                "column or make texts of them"
            )
        if not _is_unicode(cell):
            raise TaskError(
                f"{place} has a {kind} in column {column!r} that is no valid Unicode (half of a surrogate "
                "pair): correct it"
            )
    return [cell.strip() for cell in cells] if kind == "label" else cells


def _is_unicode(cell: str) -> bool:
    try:
        cell.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and value != value)


def _is_file_name(source: str) -> bool:
    return Path(source).suffix.lower() in FILE_TYPES or source.startswith((".", "~", os.sep))


def _quoted(names: Sequence[Any]) -> str:
    return ", ".join(repr(str(name)) for name in names)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
