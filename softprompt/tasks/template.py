"""The template of a row: words, and names in braces that the columns of the row fill."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from softprompt.tasks.errors import TaskError

TEXT = "text"  # the name in braces of the text, whatever its column is called
TEXT_COLUMN = "text_column"  # and of the column's name, which is the same in every row

# A row: its text, or the cells of every name in braces, with the text under `TEXT`.
Row = str | Mapping[str, str]

_PARTS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_BEFORE_COLUMNS = re.compile(r"\{text\}|\{text_column\}|[{}]")


@dataclass(frozen=True)
class Template:
    """A template, taken apart: `words[0]`, the cell of `names[0]`, `words[1]`, and so on to the last words.

    Attributes:
        words: what is the same in every row.
        names: what a row fills in: `TEXT` once, and columns.
    """

    words: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns beside the text, each once."""
        return tuple(dict.fromkeys(name for name in self.names if name != TEXT))

    def fill(self, row: Row) -> str:
        """Return the words with the cells of a row between them.

        Raises:
            TaskError: the row lacks a column.
        """
        cells = {TEXT: row} if isinstance(row, str) else row
        lacking = [name for name in self.names if name not in cells]
        if lacking:
            raise TaskError(
                f"the template reads {', '.join(f'{{{name}}}' for name in lacking)} and got a text alone: "
                "give the cells of these columns, too"
            )
        between = (cells[name] + word for name, word in zip(self.names, self.words[1:], strict=True))
        return self.words[0] + "".join(between)


@lru_cache
def parse_template(template: str, text_column: str, label_column: str) -> Template:
    """Take a template apart.

    `{text}` is the text, and so is the name of its column in braces; `{text_column}` is that name itself;
    any other name in braces is a column. `{{` and `}}` are braces.

    Raises:
        TaskError: a brace stands alone, the text is not there exactly once, or the label is.
    """
    words, names = [""], list[str]()
    end = 0
    for part in _PARTS.finditer(template):
        words[-1] += template[end : part.start()]
        end = part.end()
        name = part[1]
        if part[0] in ("{{", "}}"):
            words[-1] += part[0][0]
        elif not name:
            raise TaskError(
                f"the template {template!r} has {part[0]!r} without the name of a column: write {{{{ or }}}} "
                "for a brace that belongs to the text"
            )
        elif name == TEXT_COLUMN:
            words[-1] += text_column
        elif name == label_column and name not in (TEXT, text_column):
            raise TaskError(
                f"the template {template!r} has {{{name}}}, the column of the labels: leave it out, the "
                "label is written behind the template"
            )
        else:
            names.append(TEXT if name == text_column else name)
            words.append("")
    words[-1] += template[end:]
    if names.count(TEXT) != 1:
        raise TaskError(
            f"the template {template!r} must contain {{text}} exactly once (or "
            f"the name of its column, {{{text_column}}})"
        )
    return Template(tuple(words), tuple(names))


def from_before_columns(template: str) -> str:
    """Return a template of the time when only `{text}` and `{text_column}` were filled, as it is written now.

    Every other brace stood for itself.
    """
    return _BEFORE_COLUMNS.sub(lambda part: part[0] if len(part[0]) > 1 else 2 * part[0], template)
