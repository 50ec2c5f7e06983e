"""What the source of a table is, by its name; and text files (CSV, TSV, JSONL, JSON), from bytes to rows."""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from softprompt.tasks.errors import TaskError

TEXT_TYPES = (".csv", ".tsv", ".jsonl", ".json")
WORKBOOK = ".xlsx"
FILE_TYPES = (*TEXT_TYPES, ".parquet", WORKBOOK)
COMPRESSED = (".gz", ".bz2", ".xz", ".zip")  # behind the type of a text file: .csv.gz
# What a table may be, as the help says it.
A_TABLE = (
    f"a {', '.join(TEXT_TYPES)} (also {', '.join(COMPRESSED)} of them), .parquet or {WORKBOOK} file, a data "
    "set folder, or a data set name"
)
DATA_SET = "data set"
SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}

_MARKS = {  # the longer one first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_FOREIGN = {
    b"\x1f\x8b": "it is compressed with gzip: unpack it first",
    **{b"BZh%d1AY" % level: "it is compressed with bzip2: unpack it first" for level in range(1, 10)},
    b"\xfd7zXZ": "it is compressed with xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd: unpack it first",
    b"PK\x03\x04": "it is a zip archive, as workbooks are: rename it to .xlsx if it is one, or unpack it",
    b"\xd0\xcf\x11\xe0": "it is a workbook of old Excel: save it as .xlsx",
    b"PAR1": "it is a Parquet file: rename it to .parquet",
    b"SQLite format 3": "it is an SQLite database: write the table to a CSV file",
    b"%PDF": "it is a PDF: give the table itself",
    b"version https://git-lfs": "it is a pointer of Git LFS and not the file: fetch it with git lfs pull",
    b"<!doctype html": "it is a web page: download the table itself",
    b"<html": "it is a web page: download the table itself",
}
_WIDE = "it looks like UTF-16: give --encoding {}, or save it as UTF-8"
_ZERO = "it has zero bytes, which no text has: give the table itself, or its --encoding"
_OTHER_SHEETS = (".xls", ".xlsm", ".xlsb", ".ods")
_END = "\x00"  # no text has it
_SENTENCE = 4  # words: fewer may well be the name of a column


@dataclass(frozen=True)
class Rows:
    """What a file holds.

    Attributes:
        names: of the columns; None where every row names its own.
        rows: cells in the order of `names`, or objects.
        blank_lines: numbers, from 1, of the blank lines between rows.
        hint: what to do where the columns are not those that were expected; may be empty.
        note: what is to be said of the file; may be empty.
    """

    names: list[str] | None
    rows: list[Any]
    blank_lines: list[int]
    hint: str = ""
    note: str = ""


def kind_of(source: str | Path) -> str:
    """Return the type of a table file, also of one that is not there, or `DATA_SET`.

    It is the extension, of a compressed text file the one before that of its compression.
    """
    path = Path(source)
    kind = type_of(path)
    looks_like_a_file = kind in FILE_TYPES or str(source).startswith((".", "~", os.sep))
    if path.is_file() or (looks_like_a_file and not path.is_dir()):
        return kind
    return DATA_SET


def type_of(path: Path) -> str:
    """Return the extension in small letters, without a compression behind that of a text file."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if suffix in COMPRESSED and inner in TEXT_TYPES else suffix


def types_spoken() -> str:
    """Return the types of table files as an error names them."""
    return f"{', '.join(FILE_TYPES)} (the text files also with {', '.join(COMPRESSED)} behind it)"


def check_source(source: str | Path) -> None:
    """Raise TaskError for a table file that is not there or of an unknown type, without reading anything."""
    kind = kind_of(source)
    if kind == DATA_SET:
        return
    if not Path(source).is_file():
        raise TaskError(f"{source} does not exist: check the path of the table")
    if kind in COMPRESSED:
        raise TaskError(
            f"{source} does not say what is compressed in it: rename it to its type, as table.csv{kind} (of "
            f"{', '.join(TEXT_TYPES)}), or unpack it"
        )
    if kind in _OTHER_SHEETS:
        raise TaskError(f"{source} is a workbook of another type: save it as {WORKBOOK}")
    if kind not in FILE_TYPES:
        raise TaskError(f"{source} is of the unknown type {kind!r}: give one of {types_spoken()}")
    check_installed(Path(source))


def check_installed(path: Path) -> None:
    """Raise TaskError for a table file of a type whose package is not installed."""
    if type_of(path) == WORKBOOK and find_spec("openpyxl") is None:
        raise TaskError(
            f"{path} needs the package openpyxl: run pip install '.[cli]' in the folder of softprompt's "
            "sources"
        )


def foreign_format(start: bytes) -> str | None:
    """Return what a file of another format looks like by its first bytes, and what to do with it."""
    page = start.lower() if start.startswith(b"<") else start  # of binary formats case tells
    return next((what for magic, what in _FOREIGN.items() if page.startswith(magic)), None)


def read_text(path: Path, encoding: str | None) -> str:
    """Return the text of a file, by default as its byte order mark says or in UTF-8.

    Raises:
        TaskError: it is no text, or one in another encoding.
    """
    unreadable = f"{path} is not a readable {type_of(path)} table"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TaskError(f"{unreadable}: {error.strerror}") from error
    data = _decompressed(data, path)
    foreign = foreign_format(data[:32])
    if foreign is not None:
        raise TaskError(f"{unreadable}: {foreign}")
    marked = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if encoding is not None and marked is not None and _family(encoding) != _family(marked):
        raise TaskError(
            f"{path} begins with the byte order mark of {_family(marked)}, but --encoding is {encoding}: "
            "leave --encoding out"
        )
    try:
        text = data.decode(encoding or marked or "utf-8")
    except UnicodeError as error:
        why = _why_undecodable(data, encoding or marked or "utf-8", error, given=encoding is not None)
        raise TaskError(f"{unreadable}: {why}") from error
    if "\x00" in text:
        wide = None if encoding else _looks_wide(data)
        raise TaskError(f"{unreadable}: " + (_WIDE.format(wide) if wide else _ZERO))
    return text.removeprefix("\ufeff")


def _decompressed(data: bytes, path: Path) -> bytes:
    """Return the content of a file whose name ends with a compression, that of others as it is."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".gz":
            return gzip.decompress(data)
        if suffix == ".bz2":
            return bz2.decompress(data)
        if suffix == ".xz":
            return lzma.decompress(data)
        if suffix == ".zip":
            return _only_member(data, path)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise TaskError(
            f"{path} is not a readable {suffix} file ({error}): give the whole file, or rename it to "
            f"{type_of(path)} if it is not compressed"
        ) from error
    except (RuntimeError, NotImplementedError) as error:  # of zipfile: a password, or another compression
        raise TaskError(f"{path} cannot be unpacked here ({error}): unpack it first") from error
    return data


def _only_member(data: bytes, path: Path) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        # Archives that macOS makes have hidden files beside the true ones.
        hidden = ("__MACOSX/", ".DS_Store")
        names = [
            name for name in archive.namelist() if not name.endswith("/") and not name.startswith(hidden)
        ]
        if len(names) != 1:
            found = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
            raise TaskError(
                f"{path} has {len(names)} files in it ({found}), expected one: unpack it and give the table"
                if names
                else f"{path} has no file in it: give the table itself"
            )
        return archive.read(names[0])


def _family(encoding: str) -> str:
    """The encoding without what it says of the order of bytes and of their mark."""
    return "-".join(codecs.lookup(encoding).name.split("-")[:2])


def _looks_wide(data: bytes) -> str | None:
    """Return the form of UTF-16 whose zero bytes the file has, None where it has few."""
    some = data[:4096]
    even, odd = (some[start::2].count(0) / max(1, len(some) // 2) for start in (0, 1))
    if max(even, odd) < 0.2:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _why_undecodable(data: bytes, encoding: str, error: UnicodeError, *, given: bool) -> str:
    if not isinstance(error, UnicodeDecodeError):
        return f"it is not in {encoding} ({error}): give another --encoding"
    # A last byte alone may as well be a letter of another encoding, unless UTF-8 went well before it.
    ends = error.reason == "unexpected end of data" and not data[: error.start].isascii()
    if ends or error.reason == "truncated data":
        return "it ends in the middle of a character: was it cut short? Give the whole file"
    wide = None if given else _looks_wide(data)
    if wide:
        return _WIDE.format(wide)
    number = data.count(b"\n", 0, error.start) + 1
    place = f"byte 0x{data[error.start]:02x} in line {number} is not {encoding.upper()}"
    if given:
        return f"{place}: give another --encoding"
    guess = "cp1252" if _decodes(data, "cp1252") else "latin-1"
    start = max(data.rfind(b"\n", 0, error.start) + 1, error.start - 12)
    excerpt = data[start : error.start + 12].split(b"\n")[0].decode(guess).strip()
    return (
        f"{place}; in {guess} (Western European) it would read {excerpt!r}: give --encoding {guess}, or that "
        "of the program that wrote it, or save it as UTF-8"
    )


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def parse_csv(text: str, path: Path, *, separator: str, header: bool) -> Rows:
    """Return the rows of a CSV file; without a header its columns are called 1, 2, and so on.

    Short rows are filled with empty cells.

    Raises:
        TaskError: a quotation mark is never closed, a row is longer than the header, or the last one ends
            too early.
    """
    lines, blank = _records(text, path, separator)
    if not lines:
        return Rows([], [], [])
    names = lines.pop(0)[1] if header else [str(i + 1) for i in range(len(lines[0][1]))]
    names = [name or f"Unnamed: {i}" for i, name in enumerate(names)]
    hint = _hint(names, [row for _, row in lines], separator, header=header)
    for number, row in lines:
        if len(row) > len(names):
            advice = hint or (
                f"put texts with {_spoken(separator)} into quotation marks, or give the --separator of the "
                "file"
            )
            raise TaskError(
                f"{path} has rows with more cells than its header has columns (line {number}: {len(row)}, "
                f"expected {len(names)}): {advice}"
            )
    if lines and len(lines[-1][1]) < len(names) and not text.endswith(("\n", "\r")):
        number, row = lines[-1]
        raise TaskError(
            f"{path} ends within line {number}, with {len(row)} of {len(names)} cells and no line break: "
            "was it cut short? Give the whole file, or end the line with a line break"
        )
    rows = [row + [""] * (len(names) - len(row)) for _, row in lines]
    return Rows(names, rows, blank, hint)


def _records(text: str, path: Path, separator: str) -> tuple[list[tuple[int, list[str]]], list[int]]:
    """Return (line number, cells) of every row, and the numbers of the blank lines between them."""
    reader = csv.reader(itertools.chain(io.StringIO(text, newline=""), [_END]), delimiter=separator)
    found: list[tuple[int, list[str]]] = []
    blank: list[int] = []
    with _long_cells():
        number = 1
        try:
            for row in reader:
                if not row or (len(row) == 1 and row[0].isspace()):
                    blank.append(number)
                else:
                    found.append((number, row))
                number = reader.line_num + 1
        except csv.Error as error:
            raise TaskError(
                f"{path} is not a readable {type_of(path)} table: line {number}: {error}"
            ) from error
    number, last = found.pop()
    if last != [_END]:
        raise TaskError(
            f"{path} is not a readable {type_of(path)} table: the quotation mark that opens in line {number} "
            'is never closed: was the file cut short? Give the whole file, or write "" for a mark inside a '
            "text"
        )
    return found, between(blank, [number for number, _ in found])


def between(blank: Sequence[int], rows: Sequence[int]) -> list[int]:
    """Return the blank lines that are between the lines of rows."""
    return [number for number in blank if rows and rows[0] < number < rows[-1]]


@contextmanager
def _long_cells() -> Iterator[None]:
    """Let the csv module read cells of any length for a block."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _hint(names: Sequence[str], rows: Sequence[Sequence[str]], separator: str, *, header: bool) -> str:
    others = [mark for mark in SEPARATORS.values() if mark != separator]
    best = max(others, key=names[0].count) if len(names) == 1 else ""
    if best and best in names[0]:
        name = next(name for name, mark in SEPARATORS.items() if mark == best)
        return f"its header looks separated by {_spoken(best)}: give --separator {name}"
    if names[0].startswith(("{", "[")):
        return "its first line looks like JSON: rename it to .jsonl, with one object a line"
    return header_hint(names, rows) if header else ""


def header_hint(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return what to do where the first line looks like a title or a row and not like a header, else ""."""
    if _title_above(names, rows):
        return "its first line looks like a title above the header: remove the lines above the header"
    if _is_row(names, rows):
        return (
            "its first line looks like a row and not like a header: give --no-header, and name the columns "
            "by their numbers (1, 2, ...)"
        )
    return ""


def _title_above(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> bool:
    """Whether the first line has one cell, and those below have more: a title above the header."""
    filled = sum(name != f"Unnamed: {i}" for i, name in enumerate(names))
    return filled == 1 and any(sum(cell not in ("", None) for cell in row) > 1 for row in rows[:10])


def _is_row(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> bool:
    """Whether the cells of the first line look like those of a row."""
    some = rows[:1000]
    again = any(name in {row[i] for row in some if len(row) > i} for i, name in enumerate(names))
    return again or any(_is_number(name) or len(name.split()) >= _SENTENCE for name in names)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _spoken(separator: str) -> str:
    return {",": "commas", ";": "semicolons", "\t": "tabs", "|": "pipes"}.get(separator, repr(separator))


def parse_jsonl(text: str, path: Path) -> Rows:
    """Return the objects of a JSONL file.

    Raises:
        TaskError: a line is no JSON object.
    """
    lines = text.split("\n")
    rows, numbers, blank = list[Any](), list[int](), list[int]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            blank.append(number)
            continue
        last = number == len(lines)
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            cut = "; the file ends there: was it cut short?" if last and rows else ""
            raise TaskError(
                f"{path}: line {number} is not JSON ({error}){cut or ': write one object a line'}"
            ) from error
        if not isinstance(row, dict):
            array = " (a .json file may have them in one array)" if isinstance(row, list) else ""
            raise TaskError(f"{path}: line {number} is not a JSON object: write one object a line{array}")
        rows.append(row)
        numbers.append(number)
    return Rows(None, rows, between(blank, numbers))


def parse_json(text: str, path: Path) -> Rows:
    """Return the objects of a JSON file: an array of objects, or one object a line as in JSONL.

    Raises:
        TaskError: it is no JSON, or other JSON.
    """
    if not text.strip():
        return Rows(None, [], [])
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        # Behind a whole object comes another one: lines of JSON, which datasets calls .json, too.
        if text.lstrip().startswith("{") and str(error).startswith("Extra data"):
            return parse_jsonl(text, path)
        raise TaskError(
            f"{path} is not JSON ({error}): was it cut short? Give the whole file, an array of objects"
        ) from error
    if isinstance(content, dict):
        return _of_object(content, path)
    if not isinstance(content, list):
        raise TaskError(
            f"{path} is one JSON {type(content).__name__}: write an array of objects, one of each row"
        )
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise TaskError(
                f"{path}: entry {number} of its array is a {type(row).__name__} and not an object: write "
                "objects with the names of the columns, as pandas' to_json(orient='records') does"
            )
    return Rows(None, content, [])


def _of_object(content: dict[str, Any], path: Path) -> Rows:
    keys = [key for key, value in content.items() if isinstance(value, list) and value]
    rows = [key for key in keys if all(isinstance(row, dict) for row in content[key])]
    if rows:
        named = ", ".join(map(repr, rows))
        raise TaskError(f"{path} is an object with the rows under the key {named}: save that array alone")
    if content and all(isinstance(value, (dict, list)) for value in content.values()):
        raise TaskError(
            f"{path} is an object of columns and not an array of rows: write it with pandas' "
            "to_json(orient='records')"
        )
    if any(isinstance(value, (dict, list)) for value in content.values()):
        raise TaskError(f"{path} is one JSON object: write an array of objects, one of each row")
    return Rows(None, [content], [])  # a file of one line
