"""`softprompt doctor`: what this installation can do, and what is missing."""

import argparse
import json
from typing import TYPE_CHECKING

from softprompt.cli.errors import UsageError
from softprompt.cli.options import Parser, add_command

if TYPE_CHECKING:
    from softprompt.diagnosis import Diagnosis, Finding

BACKENDS = ("native", "triton")


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `softprompt doctor`."""
    parser = add_command(
        commands,
        "doctor",
        summary="show what this installation can do, and what is missing",
        description="Show the versions of what softprompt uses, the devices, and the back ends that can run "
        "its operations; for each one that cannot, why, and the command that mends it.",
        example="softprompt doctor --require native",
        run=run,
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON, for programs")
    parser.add_argument(
        "--require",
        action="append",
        choices=BACKENDS,
        default=[],
        metavar="BACKEND",
        help="end with an error unless this back end (native or triton) can be used; can be given twice",
    )


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis; fail where a required back end is missing."""
    from softprompt.diagnosis import diagnose

    found = diagnose()
    print(json.dumps(found.to_dict(), indent=1) if args.json else _text(found))
    device_type = "cuda" if "cuda" in found.backends else "cpu"
    for name in args.require:
        if not found.usable(name, device_type):
            raise UsageError(f"--require {name}: it cannot be used on {device_type}, see above")
    return 0


def _text(found: "Diagnosis") -> str:
    lines = [*_part("packages", found.packages), *_part("devices", found.devices)]
    for device_type, findings in found.backends.items():
        lines += _part(f"back ends on {device_type} (auto takes {found.chosen[device_type]})", findings)
    lines += _part("to build the native ops", found.build)
    return "\n".join(lines)


def _part(title: str, findings: "tuple[Finding, ...]") -> list[str]:
    width = max(len(finding.name) for finding in findings)
    lines = [title]
    for finding in findings:
        mark = {"ok": "+", "missing": "-", "unusable": "!"}[finding.state]
        lines.append(f"  {mark} {finding.name:<{width}}  {finding.detail}")
        if finding.fix is not None:
            lines.append(f"    {'':<{width}}  -> {finding.fix}")
    return lines
