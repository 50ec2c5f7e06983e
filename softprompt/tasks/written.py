"""Data frames as files in which every cell is what it was.

Text files (CSV, TSV, JSONL, JSON) have no times, decimals, bytes or (CSV, TSV) lists: these become text, in
ISO 8601, with all digits, as UTF-8 (base64 where they are none), and as JSON. So do, in workbooks, lists,
bytes, decimals, integers beyond 2**53, and times with a zone, before 1900 or finer than milliseconds.
"""

import base64
import bz2
import datetime
import gzip
import io
import json
import lzma
import math
import zipfile
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from softprompt.files import atomic_write
from softprompt.tasks.errors import TaskError
from softprompt.tasks.text_files import (
    FILE_TYPES,
    TEXT_TYPES,
    WORKBOOK,
    check_installed,
    type_of,
    types_spoken,
)
from softprompt.tasks.workbooks import holds, workbook_of


def write_frame(frame: Any, path: str | Path) -> None:
    """Write a data frame as the extension says; no half-written file is ever left.

    Raises:
        TaskError: the extension is another one, or a file of it cannot hold the cells.
    """
    path = Path(path)
    content = _encoded(frame, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def check_writable(frame: Any, path: str | Path) -> None:
    """Raise TaskError where `write_frame` would: before the work of a long run, not behind it."""
    _encoded(frame, Path(path))


def check_writable_type(path: str | Path) -> None:
    """Raise TaskError unless the extension of `path` is one that `write_frame` can write."""
    kind = type_of(Path(path))
    if kind not in FILE_TYPES:
        raise TaskError(f"cannot write {path}: its type {kind!r} is not one of {types_spoken()}")
    check_installed(Path(path))


def _encoded(frame: Any, path: Path) -> bytes:
    check_writable_type(path)
    kind = type_of(path)
    try:
        if kind in TEXT_TYPES:
            return _compressed(_text(frame, kind), path)
        return _workbook(frame) if kind == WORKBOOK else _parquet(frame)
    except (ValueError, TypeError, pa.ArrowException) as error:
        needs = {".parquet": "one type in each column", WORKBOOK: "what a sheet of Excel can hold"}
        other = needs.get(kind, "text without halves of surrogate pairs")
        raise TaskError(
            f"cannot write {path}: a {kind} file needs {other} ({' '.join(str(error).split())}): name a "
            ".jsonl file as the output"
        ) from error


def _text(frame: Any, kind: str) -> bytes:
    if kind in (".csv", ".tsv"):
        return _csv(frame, "," if kind == ".csv" else "\t").encode()
    lines = _json_lines(frame)
    return (
        b"".join(line + b"\n" for line in lines)
        if kind == ".jsonl"
        else b"[\n" + b",\n".join(lines) + b"\n]\n"
    )


def _compressed(content: bytes, path: Path) -> bytes:
    """Return the content as the end of a file's name says; the same content gives the same bytes."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.compress(content, mtime=0)
    if suffix == ".bz2":
        return bz2.compress(content)
    if suffix == ".xz":
        return lzma.compress(content)
    if suffix == ".zip":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo(path.stem), content, zipfile.ZIP_DEFLATED)
        return file.getvalue()
    return content


def _csv(frame: Any, separator: str) -> str:
    columns = [_csv_cells(frame[name]) for name in frame.columns]
    names = [str(name) for name in frame.columns]
    alone, marks = len(names) == 1, (separator, '"', "\n", "\r")
    lines = [names, *zip(*columns, strict=True)]
    return "".join(
        separator.join(_quoted(cell, marks, alone=alone) for cell in line) + "\n" for line in lines
    )


def _quoted(cell: str, marks: Sequence[str], *, alone: bool) -> str:
    # A carriage return ends a row for many readers; an empty cell alone in its line would be a blank line.
    if any(mark in cell for mark in marks) or (alone and not cell.strip()):
        return '"' + cell.replace('"', '""') + '"'
    return cell


def _csv_cells(series: Any) -> list[str]:
    values = series.tolist()
    times = [value for value in values if isinstance(value, pd.Timestamp) and not is_missing(value)]
    if times and all(value == value.normalize() for value in times):
        values = [value.date() if isinstance(value, pd.Timestamp) else value for value in values]
    if series.dtype in ("float32", pd.ArrowDtype(pa.float32())):
        values = [value if is_missing(value) else np.float32(value) for value in values]
    return ["" if is_missing(value) else _csv_cell(value) for value in values]


def _csv_cell(value: Any) -> str:
    if isinstance(value, (str, bool, int, float, np.generic, datetime.datetime, datetime.timedelta)):
        return str(value)
    plain = _plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _json_lines(frame: Any) -> list[bytes]:
    names = [str(name) for name in frame.columns]
    columns = [[_plain(value) for value in frame[name].tolist()] for name in frame.columns]
    return [_line(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can hold
        return json.dumps(row, allow_nan=False).encode()


def _parquet(frame: Any) -> bytes:
    # Without the notes of pandas on its own types, some of which it cannot read itself.
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def _workbook(frame: Any) -> bytes:
    columns = [list(map(_workbook_cell, frame[name].tolist())) for name in frame.columns]
    return workbook_of([str(name) for name in frame.columns], columns)


def _workbook_cell(value: Any) -> Any:
    if is_missing(value):
        return None
    value = value.item() if isinstance(value, np.generic) else value
    if holds(value):
        return value
    plain = _plain(value)
    return json.dumps(plain, ensure_ascii=False) if isinstance(plain, list | dict) else str(plain)


def is_missing(value: Any) -> bool:
    """Whether a cell is None, not a number, not a time, or NA."""
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)


def _plain(value: Any) -> Any:
    """Return what JSON has for a cell: null, a truth value, a number, a text, a list or an object."""
    if isinstance(value, (np.datetime64, np.timedelta64)):
        value = pd.Timestamp(value) if isinstance(value, np.datetime64) else pd.Timedelta(value)
    elif isinstance(value, np.generic):
        value = value.item()
    if is_missing(value):
        return None
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"  # JSON has no number for it
    if isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, datetime.timedelta):
        return pd.Timedelta(value).isoformat()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bytes):
        return _text_of(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()] if value.ndim else _plain(value.item())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return str(value)


def _text_of(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()
