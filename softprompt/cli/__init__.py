"""The command line: `softprompt train`, `sweep`, `predict`, `inspect`, `export`, `demo`, `doctor`."""

import logging
import sys
from collections.abc import Sequence

from softprompt import __version__
from softprompt.cli import demo, doctor, export, inspect, predict, sweep, train
from softprompt.cli.checks import UsageError, refuse_several_processes, what_the_machine_lacks
from softprompt.cli.options import HelpFormatter, Parser, add_command, read_options
from softprompt.tasks.errors import TaskError

COMMANDS = (train, sweep, predict, inspect, export, demo, doctor)


def build_parser() -> Parser:
    """Return the parser of every command."""
    parser = Parser(
        prog="softprompt",
        description="Prompt tuning for Hugging Face causal language models:\n"
        "a few virtual tokens are trained, the model stays frozen.",
        epilog="example:\n  softprompt demo\n\n`softprompt COMMAND --help` explains a command.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"softprompt {__version__}", help="print the version and leave"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        add_command(commands, command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a wrong call or unusable input, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # PEFT imports torchao where it is installed, which reports each of its CUDA libraries without CUDA.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        refuse_several_processes()
        parsed = build_parser().parse_args(arguments)
        parsed.argv = arguments
        return int(parsed.run(read_options(parsed.options, parsed)))
    except (UsageError, TaskError) as error:
        print(f"softprompt: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("softprompt: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        lacking = what_the_machine_lacks(error)
        if lacking is None:
            raise
        print(f"softprompt: {lacking}", file=sys.stderr)
        return 2
