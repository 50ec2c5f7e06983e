"""What the source of a table is, by its name alone."""

import os
from pathlib import Path

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
