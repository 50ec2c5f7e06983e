"""The parser of every command, and the options that several commands share."""

import argparse
import difflib
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import NoReturn

from softprompt.cli.errors import UsageError

WIDTH = 79
MAX_SEED = 2**31 - 1  # numpy takes 32 bits, and the seeds of an ensemble or a sweep count on from it


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


def add_command(
    commands: "argparse._SubParsersAction[Parser]",
    name: str,
    *,
    summary: str,
    description: str,
    example: str,
    run: Callable[[argparse.Namespace], int],
) -> Parser:
    """Add the parser of one command; `run` is called with its arguments and returns the exit code."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, WIDTH),
        epilog=f"example:\n  {example}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def add_prompt_options(parser: Parser) -> None:
    """Add the options that name a trained prompt and its model."""
    parser.add_argument(
        "--adapter",
        type=given,
        required=True,
        metavar="PATH",
        help="the trained prompt: a folder that `softprompt train` or PEFT wrote, or a .npy file",
    )
    parser.add_argument(
        "--model",
        type=given,
        metavar="NAME",
        help="the frozen model, if it is not where it was in training (default: the one trained with)",
    )


def add_compute_options(parser: Parser) -> None:
    """Add the options that say where and how precisely to compute, as a group of their own."""
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute; auto takes the GPU if there is one",
    )
    precision = group.add_mutually_exclusive_group()
    precision.add_argument(
        "--bf16",
        action="store_true",
        help="run the frozen model in bfloat16: half the memory, faster on GPUs (the prompt stays float32)",
    )
    precision.add_argument(
        "--fp16",
        action="store_true",
        help="run the frozen model in float16, for GPUs without bfloat16 (the prompt stays float32)",
    )
    group.add_argument(
        "--no-patch",
        action="store_true",
        help="run plain PEFT without the faster path of softprompt.patch",
    )
    group.add_argument(
        "--threads",
        type=whole(1),
        metavar="N",
        help="CPU threads of torch (default: one for the shipped tiny model, else torch's own choice)",
    )
    group.add_argument("--batch-size", type=whole(1), default=8, metavar="N", help="rows computed at once")


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
