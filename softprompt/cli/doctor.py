"""`softprompt doctor`: what this installation can do, and what is missing."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from softprompt.cli.checks import UsageError
from softprompt.cli.options import Command, flag, option

if TYPE_CHECKING:
    from softprompt.diagnosis import Diagnosis, Finding


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """The options of `softprompt doctor`."""

    json: bool = flag("print the findings as JSON, for programs")
    require: list[str] = option(
        "end with an error unless this back end (native or triton) can be used; can be given twice",
        metavar="BACKEND",
        action="append",
        choices=("native", "triton"),
        default=[],
    )


COMMAND = Command(
    DoctorConfig,
    summary="show what this installation can do, and what is missing",
    description="Show the versions of what softprompt uses, the devices, and the back ends that can run "
    "its operations; for each one that cannot, why, and the command that mends it.",
    example="softprompt doctor --require native",
)


def run(config: DoctorConfig) -> int:
    """Print the diagnosis; fail where a required back end is missing."""
    from softprompt.diagnosis import diagnose

    found = diagnose()
    print(json.dumps(found.to_dict(), indent=1) if config.json else _text(found))
    device_type = "cuda" if "cuda" in found.backends else "cpu"
    for name in config.require:
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
