"""Runs the prompt-tuning cases of a PEFT source tree against patched models, and without the patch.

    python tests/peft_suite/run.py PATH_TO_PEFT_SOURCE [--stock] [options of pytest]

The installed PEFT is tested; the tree gives the tests alone and is not written to. What they load by name is
made here, with random weights. A case that passes without the patch has to pass with it; the exit status is 1
where one does not, or where no patched model served a call, and 2 where there is nothing to run.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
# Types of adapters whose cases are chosen, as `suite_plugin` has them.
NAMES = ("PromptTuningConfig", "PromptEncoderConfig")
LEFT_OUT = ("regression", "gpu")  # folders and files that need other machines
Record = dict[str, Any]


def prompt_files(source: Path) -> list[Path]:
    """The files of a PEFT tree that name an adapter with a prompt."""
    return [
        path
        for path in sorted((source / "tests").glob("test_*.py"))
        if not any(part in path.name for part in LEFT_OUT) and any(name in path.read_text() for name in NAMES)
    ]


def run_tests(source: Path, files: list[Path], options: list[str], *, patch: bool) -> Record:
    """Outcomes of one run, see `suite_plugin`; raises RuntimeError where pytest gave none."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        path = os.pathsep.join([str(PROJECT), str(HERE), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {
            "PYTHONPATH": path.strip(os.pathsep),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "suite_plugin", "-p", "no:cacheprovider"]
        command += ["--override-ini", "addopts=", "--override-ini", "filterwarnings="]
        command += ["--continue-on-collection-errors", "--tb=line"]
        command += ["--suite-record", str(record), *(["--suite-patch"] if patch else [])]
        command += [*map(str, files), *options]
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
        if not record.exists():
            raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        loaded: Record = json.loads(record.read_text())
        return loaded


def lost(stock: Record, patched: Record) -> list[str]:
    """Cases that pass without the patch and not with it."""
    return [
        case
        for case, outcome in stock["outcomes"].items()
        if outcome == "passed" and patched["outcomes"].get(case) != "passed"
    ]


def table(stock: Record, patched: Record | None) -> list[str]:
    """Counts by file, and what was patched."""
    rows: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for case, outcome in stock["outcomes"].items():
        row = rows[case.split("::")[0]]
        row["cases"] += 1
        row[f"stock {outcome}"] += 1
        if patched is not None:
            row[f"patched {patched['outcomes'].get(case, 'missing')}"] += 1
    total: collections.Counter[str] = sum(rows.values(), collections.Counter())
    columns = ["cases", "stock passed", "stock skipped", "stock failed"]
    if patched is not None:
        columns += ["patched passed", "patched skipped", "patched failed"]
    lines = ["| file | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in [*rows.items(), ("all", total)]:
        lines.append(f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |")
    lines += [f"not collected: {name}: {why}" for name, why in stock["not_collected"].items()]
    lines += [f"fails without the patch, too: {case}: {why}" for case, why in stock["reasons"].items()]
    if patched is not None:
        lines += [f"models: {count} x {what}" for what, count in sorted(patched["models"].items())]
        lines += [f"calls: {count} x {what}" for what, count in sorted(patched["calls"].items())]
    return lines


def verdict(stock: Record, patched: Record) -> list[str]:
    """What is wrong with a run, nothing where all is well."""
    wrong = [
        f"passes without the patch only: {case}: {patched['reasons'].get(case, 'it did not run')}"
        for case in lost(stock, patched)
    ]
    if "passed" not in stock["outcomes"].values():
        wrong.append("no case passes without the patch: the run says nothing")
    if not any(what.startswith(("packed", "padded")) for what in patched["models"]):
        wrong.append("no model was patched: the run says nothing")
    if not any(what.startswith("fast") for what in patched["calls"]):
        wrong.append("no call took the fast route: the run says nothing")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a PEFT source tree, with its tests/")
    parser.add_argument("--stock", action="store_true", help="only the run without the patch")
    given, options = parser.parse_known_args(arguments)
    source = given.source.resolve()
    files = prompt_files(source)
    if not files:
        print(f"{source} is no PEFT source tree: no tests/test_*.py names {' or '.join(NAMES)}")
        return 2
    stock = run_tests(source, files, options, patch=False)
    patched = None if given.stock else run_tests(source, files, options, patch=True)
    print("\n".join(table(stock, patched)))
    wrong = [] if patched is None else verdict(stock, patched)
    print("\n".join(wrong) if wrong else "every case that passes without the patch passes with it")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
