"""What the source of a table is, by its name alone."""

import os
from pathlib import Path

from softprompt.tasks.errors import TaskError

FILE_TYPES = (".csv", ".jsonl", ".parquet")
TEXT_TYPES = (".csv", ".jsonl")
DATA_SET = "data set"


def kind_of(source: str | Path) -> str:
    """Return the extension of a table file, also of one that is not there, or `DATA_SET`."""
    path = Path(source)
    suffix = path.suffix.lower()
    looks_like_a_file = suffix in FILE_TYPES or str(source).startswith((".", "~", os.sep))
    if path.is_file() or (looks_like_a_file and not path.is_dir()):
        return suffix
    return DATA_SET


def check_source(source: str | Path) -> None:
    """Raise TaskError for a table file that is not there or of an unknown type, without reading anything."""
    kind = kind_of(source)
    if kind == DATA_SET:
        return
    if not Path(source).is_file():
        raise TaskError(f"{source} does not exist: check the path of the table")
    if kind not in FILE_TYPES:
        raise TaskError(f"{source} is of the unknown type {kind!r}: give one of {', '.join(FILE_TYPES)}")
