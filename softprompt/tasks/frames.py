"""Data frames of every column of a table: read from files and data sets, with each cell as it is there."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from softprompt.tasks.errors import TaskError
from softprompt.tasks.text_files import (
    DATA_SET,
    WORKBOOK,
    Rows,
    check_source,
    foreign_format,
    kind_of,
    parse_csv,
    parse_json,
    parse_jsonl,
    read_text,
)
from softprompt.tasks.workbooks import read_workbook


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    Attributes:
        subset: part of a data set.
        split: split of a data set; None takes "train" where there are several.
        encoding: of a text file; None goes by its byte order mark, else takes UTF-8.
        separator: between the cells of a CSV or TSV file; None takes a comma, and a tab in TSV.
        sheet: of a workbook; None takes the first one.
        header: whether the first line of a CSV or TSV file or of a sheet has the names of its columns; they
            are called 1, 2 and so on where it has not.
    """

    subset: str | None = None
    split: str | None = None
    encoding: str | None = None
    separator: str | None = None
    sheet: str | None = None
    header: bool = True


@dataclass(frozen=True)
class Source:
    """What was read.

    Attributes:
        frame: every column, its cells as they are in the source.
        class_names: the names of the classes, for each column that is a `datasets.ClassLabel`.
        blank_lines: numbers, from 1, of the blank lines between the rows of a file.
        hint: what to do where the columns are not those that were expected; may be empty.
        note: what is to be said of the file; may be empty.
    """

    frame: Any
    class_names: dict[str, list[str]] = field(default_factory=dict)
    blank_lines: list[int] = field(default_factory=list)
    hint: str = ""
    note: str = ""


def read_source(source: str | Path, reading: Reading) -> Source:
    """Read every column of a file or a data set.

    Raises:
        TaskError: the source does not exist, is of an unknown type, cannot be read or has no rows, or two of
            its columns have one name.
    """
    check_source(source)
    path, kind = Path(source), kind_of(source)
    if kind == DATA_SET:
        found = _read_dataset(str(source), reading)
    elif kind in (".csv", ".tsv"):
        text = read_text(path, reading.encoding)
        separator = reading.separator or ("\t" if kind == ".tsv" else ",")
        found = _of_rows(parse_csv(text, path, separator=separator, header=reading.header), path)
    elif kind in (".jsonl", ".json"):
        parse = parse_jsonl if kind == ".jsonl" else parse_json
        found = _of_rows(parse(read_text(path, reading.encoding), path), path)
    elif kind == WORKBOOK:
        found = _of_rows(read_workbook(path, sheet=reading.sheet, header=reading.header), path)
    else:
        found = Source(_read_parquet(path))
    if len(found.frame) == 0:
        raise TaskError(f"{source} has no rows: {found.hint or 'give a table with at least one'}")
    return found


def quoted(names: Sequence[Any]) -> str:
    """Return names in quotation marks, with commas between them."""
    return ", ".join(repr(str(name)) for name in names)


def _check_names(names: Sequence[str], path: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TaskError(f"{path} has several columns of the name {quoted(twice)}: rename all but one of them")


def _of_rows(rows: Rows, path: Path) -> Source:
    _check_names(rows.names or [], path)
    frame = pd.DataFrame(rows.rows, columns=rows.names, dtype=object)
    return Source(frame, blank_lines=rows.blank_lines, hint=rows.hint, note=rows.note)


def _read_parquet(path: Path) -> Any:
    try:
        table = pq.ParquetFile(path).read()
    except (OSError, ValueError, pa.ArrowException) as error:
        with path.open("rb") as file:
            start = file.read(32)
        foreign = None if start.startswith(b"PAR1") else foreign_format(start)
        why = foreign or f"{_first_line(error)}: was it cut short?"
        raise TaskError(f"{path} is not a readable .parquet table: {why}") from error
    table = _with_index(table)
    _check_names(table.column_names, path)
    return _frame_of(table)


def _frame_of(table: pa.Table) -> Any:
    # In Arrow's own types: numpy's have no missing integers, and none of the nested types.
    return table.to_pandas(types_mapper=pd.ArrowDtype, ignore_metadata=True)


def _with_index(table: pa.Table) -> pa.Table:
    """Return the table with the index of a pandas data frame as columns before the others.

    An index of integers without a name counts rows, and is left out.
    """
    described = table.schema.pandas_metadata or {}
    names = {entry.get("field_name"): entry.get("name") for entry in described.get("columns", [])}
    first: list[tuple[str, Any]] = []
    for place in described.get("index_columns", []):
        if isinstance(place, dict):  # a range, which is described and not stored
            if place.get("name") is not None:
                numbers = range(place["start"], place["stop"], place["step"])
                first.append((str(place["name"]), pa.array(numbers, pa.int64())))
        elif place in table.column_names:
            column = table.column(place)
            table = table.drop_columns([place])
            if names.get(place) is not None:
                first.append((str(names[place]), column))
            elif not pa.types.is_integer(column.type):
                first.append(("index", column))
    columns = [column for _, column in first] + table.columns
    return pa.table(columns, names=[name for name, _ in first] + table.column_names)


def _read_dataset(source: str, reading: Reading) -> Source:
    import datasets

    folder = Path(source)
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    if saved and reading.subset is not None:
        raise TaskError(f"{source} is one saved data set without parts: leave --data-config out")
    try:
        loaded = datasets.load_from_disk(source) if saved else datasets.load_dataset(source, reading.subset)
    except MemoryError:
        raise
    except Exception as error:  # a data set has its own code and its own errors
        raise TaskError(_why_not_loaded(source, folder, error)) from error
    if isinstance(loaded, datasets.DatasetDict):
        split = reading.split or "train"
        if split not in loaded:
            raise TaskError(f"{source} has no split {split!r}: name one of {quoted(list(loaded))}")
        loaded = loaded[split]
    elif reading.split not in (None, "train", str(loaded.split)):
        raise TaskError(f"{source} is one data set without splits: leave --data-split out")
    frame = _frame_of(loaded.with_format("arrow")[:])
    class_names = {}
    for name, feature in loaded.features.items():
        if isinstance(feature, datasets.ClassLabel):
            numbers = frame[name].tolist()
            cells = [None if pd.isna(i) or i < 0 else feature.names[i] for i in numbers]
            frame[name] = pd.Series(cells, dtype=pd.ArrowDtype(pa.string()))
            class_names[name] = list(feature.names)
    return Source(frame, class_names)


def _why_not_loaded(source: str, folder: Path, error: Exception) -> str:
    scripts = sorted(folder.glob("*.py")) if folder.is_dir() else []
    if "dataset scripts" in str(error).lower() or (scripts and folder.name == scripts[0].stem):
        name = scripts[0].name if scripts else "of its own"
        return (
            f"{source} is a data set with a loading script ({name}), which the datasets library does not run "
            "any more: save its rows as a .csv, .jsonl or .parquet file and give that"
        )
    cause = error.__cause__ or error  # datasets wraps what went wrong into an error that does not say it
    return (
        f"{source} is neither a table file nor a data set that can be loaded ({_first_line(cause)}): "
        "check the name or the path"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
