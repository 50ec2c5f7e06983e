"""`python -m benchmarks run` and `python -m benchmarks report`, from the root of the repository."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cases import CASES, FULL_SUITES, SUITES
from benchmarks.report import ReportError, report
from benchmarks.run import run, write_record

_HERE = Path(__file__).parent
_RESULTS, _README = _HERE / "results", _HERE.parent / "README.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, 1 where a variant failed its check, 2 where the report cannot be written.
    """
    args = _parser().parse_args(argv)
    return int(args.command(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed and memory beside PEFT.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    measure = commands.add_parser("run", help="measure cases and write a record")
    what = measure.add_mutually_exclusive_group()
    what.add_argument(
        "--suite", choices=sorted(SUITES), default="cpu", help="the cases of a suite (default: cpu)"
    )
    what.add_argument(
        "--cases", nargs="+", choices=sorted(CASES), metavar="CASE", help=f"of {', '.join(CASES)}"
    )
    measure.add_argument(
        "--full", action="store_true", help="the suite's cases at the full shape of BLOOM-560m"
    )
    measure.add_argument("--rounds", type=_positive, metavar="N", help="timed steps of each variant")
    measure.add_argument(
        "--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)"
    )
    measure.add_argument(
        "--tiny", action="store_true", help="toy sizes: tests the runner and measures nothing"
    )
    measure.add_argument("--output", type=Path, default=_RESULTS, metavar="FOLDER", help="where records go")
    measure.set_defaults(command=_run)
    render = commands.add_parser("report", help="render the newest records into the README")
    render.add_argument("--results", type=Path, default=_RESULTS, metavar="FOLDER", help="where records lie")
    render.add_argument(
        "--readme", type=Path, default=_README, metavar="FILE", help="file with the two markers"
    )
    render.set_defaults(command=_report)
    return parser


def _run(args: argparse.Namespace) -> int:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    names = args.cases or (FULL_SUITES if args.full else SUITES)[args.suite]
    record = run([CASES[name] for name in names], rounds=args.rounds, tiny=args.tiny)
    print(write_record(record, args.output))
    return 0 if all(v["check"]["passed"] for case in record["cases"] for v in case["variants"]) else 1


def _report(args: argparse.Namespace) -> int:
    try:
        for path in report(args.results, args.readme):
            print(path)
    except ReportError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
