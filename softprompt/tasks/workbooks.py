"""Workbooks of Excel (.xlsx): a sheet as rows, and columns as a sheet that is read as what they were."""

import datetime
import io
import math
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from softprompt.tasks.errors import TaskError
from softprompt.tasks.text_files import Rows, between, foreign_format, header_hint

MOST_CHARACTERS, MOST_ROWS, MOST_COLUMNS = 32_767, 2**20, 2**14
EXACT = 2**53  # numbers of Excel are float64: whole numbers up to here are what they are

# ECMA-376, ST_Xstring: characters that XML has not are written as _xHHHH_; where a text has such a word, its
# first mark is.
_ESCAPED = re.compile(r"_x(005F|00[01][0-9A-F]|FFF[EF])_", re.IGNORECASE)
_TO_ESCAPE = re.compile(r"[\x00-\x08\x0b-\x1f\ufffe\uffff]|_(?=x[0-9A-Fa-f]{4}_)")
_TIMES = (datetime.date, datetime.time, datetime.timedelta)


def read_workbook(path: Path, *, sheet: str | None, header: bool) -> Rows:
    """Return the rows of a sheet, None the first one; without a header its columns are called 1, 2, ...

    Numbers that are whole are integers, since Excel has none; where a column has no time of day, its dates
    are dates. Cells without content, and those of an error, are None.

    Raises:
        TaskError: the file is no workbook, cannot be read, or has no such sheet.
    """
    sheets, lines = _lines(path, sheet)
    found = [(number, line) for number, line in enumerate(lines, start=1) if not all(map(_is_blank, line))]
    numbers = [number for number, _ in found]
    rows = [line for _, line in found]
    head = rows.pop(0) if header and rows else []
    names = [f"Unnamed: {i}" if _is_blank(cell) else str(cell) for i, cell in enumerate(head)]
    if not header:
        names = [str(i + 1) for i in range(len(rows[0]) if rows else 0)]
    blank = between(sorted(set(range(1, len(lines) + 1)) - set(numbers)), numbers)
    others, spoken = len(sheets) > 1 and sheet is None, ", ".join(map(repr, sheets))
    hint = header_hint(names, rows) if names and header else ""
    return Rows(
        names,
        _with_dates(rows),
        blank,
        hint or (f"its sheets are {spoken}: name the one of the table with --sheet" if others else ""),
        f"only the first of its sheets was read ({spoken}); --sheet names another" if others else "",
    )


def _lines(path: Path, sheet: str | None) -> tuple[list[str], list[list[Any]]]:
    """Return the names of the sheets, and the cells of every line of one of them."""
    try:
        with warnings.catch_warnings():
            # Of what is no cell: styles, and extensions as rules for what may be typed.
            warnings.filterwarnings("ignore", ".*(default style|not supported)", UserWarning)
            with pd.ExcelFile(path, engine="openpyxl") as book:
                sheets = [str(each.title) for each in book.book.worksheets]  # those of charts have no cells
                if sheet is not None and sheet not in sheets:
                    raise TaskError(
                        f"{path} has no sheet {sheet!r}: name one of {', '.join(map(repr, sheets))}"
                    )
                sheet = sheet or sheets[0]
                frame = pd.read_excel(book, sheet_name=sheet, header=None, dtype=object, na_filter=False)
    except (TaskError, MemoryError):
        raise
    except Exception as error:  # a damaged file is whatever the reader stumbles over
        raise TaskError(f"{path} is not a readable .xlsx table: {_why_unreadable(path, error)}") from error
    return sheets, [list(map(_cell, line)) for line in frame.values.tolist()]


def _why_unreadable(path: Path, error: Exception) -> str:
    data = path.read_bytes()
    if "EncryptedPackage".encode("utf-16-le") in data:
        return "it has a password: save it without one"
    archive = data.startswith(b"PK\x03\x04")
    foreign = None if archive else foreign_format(data[:32])
    if foreign is not None:
        return foreign
    if not archive:
        return "it is no workbook: rename it to its type (.csv where it is text), or save it as .xlsx"
    if not zipfile.is_zipfile(path):
        return "it ends too early: was it cut short? Give the whole file"
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{said}: save it as .xlsx with Excel or LibreOffice, or the sheet as CSV in UTF-8"


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return _ESCAPED.sub(lambda escaped: chr(int(escaped[1], 16)), value) or None
    if isinstance(value, float) and math.isnan(value):
        return None
    return float(value) if isinstance(value, int) and abs(value) > EXACT else value


def _is_blank(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _with_dates(rows: list[list[Any]]) -> list[list[Any]]:
    """Return the rows with dates in the columns whose times are all midnight."""
    midnight, columns = datetime.time(), list[Sequence[Any]]()
    for column in zip(*rows, strict=True):
        times = [cell for cell in column if isinstance(cell, datetime.datetime)]
        days = bool(times) and all(cell.time() == midnight for cell in times)
        columns.append(
            [cell.date() if days and isinstance(cell, datetime.datetime) else cell for cell in column]
        )
    return [list(row) for row in zip(*columns, strict=True)]


def holds(value: Any) -> bool:
    """Whether a cell of a workbook can be a value; others have to be written as text."""
    from openpyxl.utils.datetime import from_excel, to_excel

    if isinstance(value, bool | str | None):
        return True
    if isinstance(value, int):
        return abs(value) <= EXACT
    if isinstance(value, float):
        return math.isfinite(value)
    if not isinstance(value, _TIMES) or getattr(value, "tzinfo", None) is not None:
        return False
    number = to_excel(value)
    if number < 0:  # times before 1900, and negative durations
        return False
    read = from_excel(number, timedelta=isinstance(value, datetime.timedelta))
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        return bool(read == datetime.datetime.combine(value, datetime.time()))
    return bool(read == value)


def workbook_of(names: Sequence[str], columns: Sequence[Sequence[Any]]) -> bytes:
    """Return a workbook of one sheet with a header.

    Texts stay texts, also those that Excel would take for a formula or an error.

    Args:
        names: of the columns.
        columns: the cells of each, all of which `holds` accepts.

    Raises:
        ValueError: a sheet has no room for so many rows or columns, or a cell for so long a text.
    """
    from openpyxl import Workbook

    rows = max(map(len, columns), default=0)
    if rows >= MOST_ROWS or len(columns) > MOST_COLUMNS:
        raise ValueError(
            f"{rows:,} rows below the header and {len(columns):,} columns, at most {MOST_ROWS - 1:,} and "
            f"{MOST_COLUMNS:,}"
        )
    texts = [
        [_text(cell, name, row) for row, cell in enumerate([name, *column])]
        for name, column in zip(names, columns, strict=True)
    ]
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    for line in zip(*texts, strict=True):
        sheet.append(list(_cells(sheet, line)))
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


def _text(cell: Any, name: str, row: int) -> Any:
    """Return a text as a workbook has it, any other cell as it is."""
    if not isinstance(cell, str):
        return cell
    text = _TO_ESCAPE.sub(lambda mark: f"_x{ord(mark[0]):04X}_", cell)
    units = len(text.encode("utf-16-le")) // 2
    if units > MOST_CHARACTERS:
        raise ValueError(
            f"row {row} has {units:,} characters in column {name!r}, at most {MOST_CHARACTERS:,}"
        )
    return text


def _cells(sheet: Any, line: Sequence[Any]) -> Iterator[Any]:
    from openpyxl.cell import WriteOnlyCell

    for value in line:
        if isinstance(value, str | float):
            # Else "=1" would be a formula, "#N/A" an error, and a number would be rounded to 16 digits.
            cell = WriteOnlyCell(sheet, value if isinstance(value, str) else repr(value))
            cell.data_type = "s" if isinstance(value, str) else "n"
        else:
            cell = WriteOnlyCell(sheet, value)
        yield cell
