"""The options that say how a table is read, which `train`, `sweep` and `predict` share."""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from softprompt.cli.errors import UsageError
from softprompt.cli.options import given, words
from softprompt.tasks.sources import DATA_SET, TEXT_TYPES, kind_of
from softprompt.tasks.text_files import SEPARATORS

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}

# option -> (kinds of tables that it is for, in words)
_FOR = {
    "data_config": ((DATA_SET,), "data sets"),
    "data_split": ((DATA_SET,), "data sets"),
    "encoding": (TEXT_TYPES, ".csv and .jsonl files"),
    "separator": ((".csv",), ".csv files"),
    "no_header": ((".csv",), ".csv files"),
}


def add_table_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that choose a part of a data set, and those that say how a file is written."""
    group.add_argument(
        "--data-config", type=given, metavar="NAME", help="part of a data set from the `datasets` library"
    )
    group.add_argument(
        "--data-split",
        type=given,
        metavar="NAME",
        help="split of such a data set to read (default: train)",
    )
    group.add_argument(
        "--encoding",
        type=encoding,
        metavar="NAME",
        help="encoding of .csv and .jsonl tables, as cp1252 (default: what their byte order mark says, else "
        "UTF-8)",
    )
    group.add_argument(
        "--separator",
        type=separator,
        metavar="MARK",
        help=f"what separates the cells of .csv tables: one character, or {', '.join(SEPARATORS)} "
        "(default: comma)",
    )
    group.add_argument(
        "--no-header",
        action="store_true",
        help="the first line of .csv tables is a row: their columns are called 1, 2, and so on",
    )


def table_arguments(args: argparse.Namespace, sources: Sequence[str]) -> dict[str, Any]:
    """Return what `read_table` is told of the options.

    Raises:
        UsageError: an option was given that means nothing for any of the sources.
    """
    kinds = {kind_of(source) for source in sources}
    for name, (wanted, spoken) in _FOR.items():
        if getattr(args, name) and not kinds & set(wanted):
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} is for {spoken}, and {' and '.join(sources)} is none: leave it out")
    return {
        "subset": args.data_config,
        "split": args.data_split,
        "encoding": args.encoding,
        "separator": args.separator or ",",
        "header": not args.no_header,
    }


def encoding(text: str) -> str:
    """An argument type: the name of an encoding of texts."""
    try:
        "".encode(text)
        b"".decode(text)
    except (LookupError, ValueError):
        raise argparse.ArgumentTypeError(
            f"no encoding is called {text!r}; expected a name as utf-16, cp1252 or shift_jis"
        ) from None
    return text


def separator(text: str) -> str:
    """An argument type: one character, as itself or by its name."""
    mark = _ESCAPES.get(text, SEPARATORS.get(text.lower(), text))
    if len(mark) != 1 or mark in '"\n\r\0':
        raise argparse.ArgumentTypeError(f"expected one character, or {', '.join(SEPARATORS)}, got {text!r}")
    return mark


def template_text(text: str) -> str:
    r"""An argument type: a template, in which a typed \n, \t and \\ are a new line, a tab and a backslash."""
    return re.sub(r"\\[nt\\]", lambda typed: _ESCAPES[typed[0]], words(text))
