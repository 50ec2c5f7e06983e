"""How the options of a command are declared: as fields of a frozen dataclass, checked one by one.

Here are also the options that several commands share, and the types of their values.
"""

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, NoReturn, TypeVar

from softprompt.cli.checks import UsageError
from softprompt.tasks.labels import clean_label
from softprompt.tasks.text_files import DATA_SET, SEPARATORS, TEXT_TYPES, WORKBOOK, kind_of

Options = TypeVar("Options")

WIDTH = 79
DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_SEED = 2**31 - 1  # numpy takes 32 bits, and the seeds of an ensemble or a sweep count on from it
_CSV_TYPES = (".csv", ".tsv")
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong call as one line, which names the help of the command."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse; what a command does not know is its own error, and not one of the program around it."""
        self._arguments = list(sys.argv[1:] if args is None else args)
        parsed, unknown = super().parse_known_args(self._arguments, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of printing the usage and leaving."""
        raise UsageError(f"{message}{self._meant()} (see {self.prog} --help)")

    def _meant(self) -> str:
        """The options that resemble unknown ones."""
        if self._subparsers is not None:  # the options that follow are those of a command
            return ""
        options = self._option_string_actions
        given = (argument.split("=")[0] for argument in self._arguments if argument.startswith("--"))
        near = [difflib.get_close_matches(name, options, n=1) for name in given if name not in options]
        found = " and ".join(dict.fromkeys(name for names in near for name in names))
        return f"; did you mean {found}?" if found else ""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of an example as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


@dataclass(frozen=True)
class Command:
    """What the help says of a command, and the dataclass of its options, which its `run` gets."""

    options: type[Any]
    summary: str
    description: str
    example: str


def add_command(commands: "argparse._SubParsersAction[Parser]", module: Any) -> None:
    """Add the parser of a module with a `COMMAND` and a function `run`, which returns the exit code."""
    command: Command = module.COMMAND
    parser = commands.add_parser(
        module.__name__.rpartition(".")[2],
        help=command.summary,
        description=textwrap.fill(command.description, WIDTH),
        epilog=f"example:\n  {command.example}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=module.run, options=command.options)
    add_options(parser, command.options)


def option(
    text: str,
    kind: Callable[[str], Any] | None = None,
    metavar: str | tuple[str, ...] | None = None,
    *,
    default: Any = None,
    **more: Any,
) -> Any:
    """Return a dataclass field that is an option, its text in the help, and the type of its value.

    Args:
        text: of the help.
        kind: an argument type, None for a text.
        metavar: how the help calls the value.
        default: shown in the help, unless it is None or False.
        more: `group`, the title of a group of options, which the fields behind it are in, too; `one_of`, the
            name of options that exclude each other; `only_for`, the kinds of tables that it is for;
            `shortcuts`, options without a value that stand for one of the values; anything else is for
            `ArgumentParser.add_argument`.
    """
    described = {"help": text, "type": kind, "metavar": metavar, "default": default, **more}
    argument = {name: value for name, value in described.items() if value is not None or name == "default"}
    return field(default=tuple(default) if isinstance(default, list) else default, metadata=argument)


def flag(text: str, **more: Any) -> Any:
    """Return a dataclass field that is an option without a value, False unless it is given."""
    return option(text, default=False, action="store_true", **more)


def nested(options: type[Any], *, without: Sequence[str] = ()) -> Any:
    """Return a dataclass field that holds options of another dataclass, all but those `without`."""
    return field(default_factory=options, metadata={"options": options, "without": without})


def option_fields(options: type[Any], without: Sequence[str] = ()) -> Iterator[Field[Any]]:
    """Yield the fields that are options, those of nested dataclasses in their place."""
    for each in fields(options):
        if "options" in each.metadata:
            yield from option_fields(each.metadata["options"], each.metadata["without"])
        elif "help" in each.metadata and each.name not in without:
            yield each


def add_options(parser: Parser, options: type[Any]) -> None:
    """Add the fields of a dataclass to a parser, group by group."""
    group: argparse._ActionsContainer = parser
    exclusive: dict[str, argparse._ActionsContainer] = {}
    for each in option_fields(options):
        argument = dict(each.metadata)
        title, one_of, _, shortcuts = (
            argument.pop(name, None) for name in ("group", "one_of", "only_for", "shortcuts")
        )
        group = group if title is None else parser.add_argument_group(title)
        place = group
        if one_of is not None:
            if one_of not in exclusive:
                exclusive[one_of] = group.add_mutually_exclusive_group()
            place = exclusive[one_of]
        name = option_name(each.name)
        place.add_argument(name, **argument)
        for short, value in (shortcuts or {}).items():
            text = f"the same as {name} {value}"
            place.add_argument(
                short, dest=each.name, action="store_const", const=value, help=text, default=argparse.SUPPRESS
            )


def read_options(options: type[Options], arguments: argparse.Namespace | dict[str, Any]) -> Options:
    """Return a dataclass of options with the values of a parsed command line; others have their defaults."""
    values = arguments if isinstance(arguments, dict) else vars(arguments)
    found = {}
    for each in fields(options):  # type: ignore[arg-type]
        if "options" in each.metadata:
            found[each.name] = read_options(each.metadata["options"], values)
        elif each.name in values:
            found[each.name] = values[each.name]
    return options(**found)


def values_of(options: Any) -> dict[str, Any]:
    """Return the values of a dataclass of options, those of nested ones beside the others."""
    values: dict[str, Any] = {}
    for each in fields(options):
        value = getattr(options, each.name)
        values |= values_of(value) if "options" in each.metadata else {each.name: value}
    return values


def option_name(name: str) -> str:
    """Return what a field is called on the command line."""
    return "--" + name.replace("_", "-")


def given(text: str) -> str:
    """An argument type: a name or a path. An empty one is a variable of the shell that was never set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def words(text: str) -> str:
    """An argument type: a text for the tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be valid UTF-8, got {text!r}") from None
    return text


def whole(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Return an argument type: a whole number from `minimum` to `maximum` (None: any from there on)."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        if maximum is not None and value > maximum:
            raise argparse.ArgumentTypeError(f"must be at most {maximum}, got {value}")
        return value

    return parse


def number(
    minimum: float, below: float = float("inf"), *, open_start: bool = False
) -> Callable[[str], float]:
    """Return an argument type: a number from `minimum` (without it where `open_start`) to under `below`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        above_start = value > minimum if open_start else value >= minimum
        if not (above_start and value < below):
            start = "more than" if open_start else "at least"
            end = "" if below == float("inf") else f" and less than {below:g}"
            raise argparse.ArgumentTypeError(f"must be {start} {minimum:g}{end}, got {text}")
        return value

    return parse


def encoding_name(text: str) -> str:
    """An argument type: the name of an encoding of texts."""
    try:
        "".encode(text)
        b"".decode(text)
    except (LookupError, ValueError):
        raise argparse.ArgumentTypeError(
            f"no encoding is called {text!r}; expected a name as utf-16, cp1252 or shift_jis"
        ) from None
    return text


def separator_mark(text: str) -> str:
    """An argument type: one character, as itself or by its name."""
    mark = _ESCAPES.get(text, SEPARATORS.get(text.lower(), text))
    if len(mark) != 1 or mark in '"\n\r\0':
        raise argparse.ArgumentTypeError(f"expected one character, or {', '.join(SEPARATORS)}, got {text!r}")
    return mark


def label_and_words(text: str) -> tuple[str, str]:
    """An argument type: a label and the words for it, split at the first "="."""
    label, mark, spoken = words(text).partition("=")
    label, spoken = clean_label(label), clean_label(spoken)
    if not (label and mark and spoken):
        raise argparse.ArgumentTypeError(f"expected LABEL=WORDS, got {text!r}")
    return label, spoken


def template_text(text: str) -> str:
    r"""An argument type: a template, in which a typed \n, \t and \\ are a new line, a tab and a backslash."""
    return re.sub(r"\\[nt\\]", lambda typed: _ESCAPES[typed[0]], words(text))


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How a table is read, and which part of a data set."""

    data_config: str | None = option(
        "part of a data set from the `datasets` library", given, "NAME", only_for=(DATA_SET,)
    )
    data_split: str | None = option(
        "split of such a data set to read (default: train)", given, "NAME", only_for=(DATA_SET,)
    )
    encoding: str | None = option(
        "encoding of .csv, .tsv, .jsonl and .json tables, as cp1252 (default: what their byte order mark "
        "says, else UTF-8)",
        encoding_name,
        "NAME",
        only_for=TEXT_TYPES,
    )
    separator: str | None = option(
        f"what separates the cells of .csv and .tsv tables: one character, or {', '.join(SEPARATORS)} "
        "(default: comma, of .tsv tab)",
        separator_mark,
        "MARK",
        only_for=_CSV_TYPES,
    )
    sheet: str | None = option(
        "sheet of .xlsx tables to read (default: the first one)", given, "NAME", only_for=(WORKBOOK,)
    )
    no_header: bool = flag(
        "the first line of .csv, .tsv and .xlsx tables is a row: their columns are called 1, 2, and so on",
        only_for=(*_CSV_TYPES, WORKBOOK),
    )

    skip_empty: bool = flag(
        "leave rows without a text or a label out, with a count; `softprompt predict` writes them without a "
        "prediction"
    )

    def reading(self, sources: Sequence[str]) -> dict[str, Any]:
        """Return what `read_table` is told of the options.

        Raises:
            UsageError: an option was given that means nothing for any of the sources.
        """
        kinds, named = {kind_of(source) for source in sources}, " and ".join(sources)
        for each in fields(self):
            wanted = each.metadata.get("only_for", kinds)
            if getattr(self, each.name) and not kinds & set(wanted):
                *others, last = wanted
                files = f"{', '.join(others)} and {last} files" if others else f"{last} files"
                spoken = "data sets" if last == DATA_SET else files
                raise UsageError(
                    f"{option_name(each.name)} is for {spoken}, and {named} is none: leave it out"
                )
        return {
            "subset": self.data_config,
            "split": self.data_split,
            "encoding": self.encoding,
            "separator": self.separator,
            "sheet": self.sheet,
            "header": not self.no_header,
            "skip_empty": self.skip_empty,
        }


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Where and how precisely to compute."""

    device: str = option(
        "where to compute; auto takes the GPU if there is one",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        group="computing",
    )
    dtype: str = option(
        "dtype of the frozen model (the prompt stays float32); auto takes bfloat16, which halves the memory, "
        "where the GPU, or the CPU (AVX-512 BF16, AMX), multiplies it itself, and float32 elsewhere and for "
        "the shipped tiny model; float16 is for GPUs without bfloat16",
        default="auto",
        choices=DTYPES,
        one_of="precision",
        shortcuts={"--bf16": "bfloat16", "--fp16": "float16"},
    )
    no_patch: bool = flag("run plain PEFT without the faster path of softprompt.patch")
    threads: int | None = option(
        "CPU threads of torch (default: one for the shipped tiny model, else torch's own choice)",
        whole(1),
        "N",
    )
    batch_size: int = option("rows computed at once", whole(1), "N", default=16)


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """A trained prompt and its model."""

    adapter: str = option(
        "the trained prompt: a folder that `softprompt train` or PEFT wrote, or a .npy file",
        given,
        "PATH",
        required=True,
    )
    model: str | None = option(
        "the frozen model, if it is not where it was in training (default: the one trained with)",
        given,
        "NAME",
    )
