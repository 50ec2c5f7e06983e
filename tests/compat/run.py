"""The tests of models and commands against the oldest supported and the newest packages.

    python tests/compat/run.py [ENVIRONMENT ...] [--record FILE]

Each environment is a virtual environment of its own with softprompt installed into it, native ops included.
The oldest versions are the lower bounds in pyproject.toml; the newest are what pip finds. On Linux pip takes
a CUDA build of torch, which is gigabytes; PIP_INDEX_URL and its like choose another one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "peft")
# What the tests need beside, at any version; setuptools and ninja build the native ops.
TOOLS = ("setuptools>=77", "ninja", "pytest", "pytest-xdist", "hypothesis", "numpy")
# name -> the packages that have their oldest supported version; the others have their newest.
ENVIRONMENTS = {
    "oldest": PACKAGES,
    "oldest-torch": ("torch",),
    "oldest-transformers": ("transformers",),
    "oldest-peft": ("peft",),
    "newest": (),
}
TESTS = (
    "tests/models",
    "tests/contract",
    "tests/test_encoders.py",
    "tests/robustness/test_fuzz.py",
    "tests/test_peft_calls.py",
    "tests/engine/test_seq2seq.py",
    "tests/engine/test_seq2seq_calls.py",
    "tests/generation/test_generate.py",
    "tests/generation/test_generate_corners.py",
    "tests/generation/test_generate_stock.py",
    "tests/cli",
    "tests/tasks",
)
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- environments:begin -->", "<!-- environments:end -->"
RECORD = ROOT / "benchmarks" / "results" / "compat" / "environments.json"


def oldest_versions() -> dict[str, str]:
    """Package -> its lower bound in pyproject.toml."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        dependencies = tomllib.load(file)["project"]["dependencies"]
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\w.]+)", line).groups() for line in dependencies)
    return {name: bounds[name] for name in PACKAGES}


def requirements(environment: str) -> list[str]:
    """What pip is asked for."""
    oldest = oldest_versions()
    pinned = [f"{name}=={oldest[name]}" if name in ENVIRONMENTS[environment] else name for name in PACKAGES]
    return [*pinned, "triton"] if sys.platform == "linux" else pinned


def install(environment: str, folder: Path) -> Path:
    """Makes the virtual environment, from nothing, and returns its Python.

    `folder / "sources"` keeps the tests, without the package: they can import only what was installed.
    """
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    wanted = requirements(environment)
    subprocess.run([*pip, *wanted, *TOOLS], check=True)
    sources = folder / "sources"
    left_out = shutil.ignore_patterns(
        ".git", ".venv", "build", "*.egg-info", "*.so", ".*_cache", "__pycache__"
    )
    shutil.copytree(ROOT, sources, ignore=left_out)
    # Pinned again, so that nothing moves them; without isolation, so that the native ops find torch.
    subprocess.run([*pip, "--no-build-isolation", *wanted, f"{sources}[cli]"], check=True)
    shutil.rmtree(sources / "softprompt")
    subprocess.run([str(folder / "bin" / "softprompt"), "doctor", "--require", "native"], check=True)
    return python


def run_tests(python: Path, folder: Path, tests: list[str], workers: int) -> dict:
    """Runs the tests in this environment and returns what came out."""
    results, models = folder / "results.xml", folder / "models.jsonl"
    for old in (results, models):
        old.unlink(missing_ok=True)
    began = time.perf_counter()
    command = [str(python), "-m", "pytest", "-q", "-n", str(workers), f"--junitxml={results}", *tests]
    variables = {"SOFTPROMPT_RECORD_MODELS": str(models), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=folder / "sources", env={**os.environ, **variables})
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(results).getroot().iter("testsuite"):
        counts = {name: count + int(suite.get(name, 0)) for name, count in counts.items()}
    return counts | {"seconds": round(time.perf_counter() - began)} | _models(models)


def _models(path: Path) -> dict:
    """Of the records of tests/models: how many architectures are packed, and the largest error."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    packed = {line["name"] for line in lines if line.get("route") == "packed"}
    errors = [line["padded"] for line in lines if line["name"] in packed and line.get("padded") is not None]
    return {"packed": len(packed), "largest_error": max(errors, default=None)}


def versions(python: Path) -> dict[str, str]:
    """Of the packages that the environment has."""
    names = [*PACKAGES, "triton", "numpy"]
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    return json.loads(
        subprocess.run([str(python), "-c", code], capture_output=True, check=True, text=True).stdout
    )


def table(record: dict[str, dict]) -> str:
    """The record as a Markdown table."""
    rows = [
        "| environment | torch | transformers | peft | tests | failed | skipped | packed | largest error |"
    ]
    rows.append("|---" * 9 + "|")
    for name in filter(record.get, ENVIRONMENTS):
        entry = record[name]
        error = entry.get("largest_error")
        cells = [name, *(entry["versions"][package] for package in PACKAGES), str(entry["tests"])]
        cells += [str(entry["failures"] + entry["errors"]), str(entry["skipped"])]
        cells += [str(entry.get("packed", "-")), "-" if error is None else f"{error:.0e}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def write_page(record: dict[str, dict], page: Path) -> None:
    """Puts the table between its marks on the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{page} has no {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{table(record)}\n{END}{after}", encoding="utf-8")


def main() -> int:
    """Runs the environments one after the other; 1 where a test failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(ENVIRONMENTS)
    parser.add_argument("environments", nargs="*", metavar="ENVIRONMENT", help=f"of {names}; all if none")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="files and folders of tests")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "compat", help="of the environments")
    parser.add_argument("--record", type=Path, default=RECORD, help="JSON file: an entry per environment")
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown page that gets the table")
    parser.add_argument("--workers", type=int, default=2, help="processes that test")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.environments) - set(ENVIRONMENTS))
    if unknown:
        parser.error(f"unknown environments {', '.join(unknown)}; there are {names}")
    failed = []
    for name in arguments.environments or ENVIRONMENTS:
        folder = arguments.folder.resolve() / name
        python = install(name, folder)
        entry = {"date": datetime.now(UTC).date().isoformat(), "versions": versions(python)}
        entry |= run_tests(python, folder, arguments.tests, arguments.workers)
        print(f"{name}: {json.dumps(entry)}", flush=True)
        known = json.loads(arguments.record.read_text(encoding="utf-8")) if arguments.record.exists() else {}
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
        known[name] = entry
        arguments.record.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        write_page(known, arguments.page)
        if entry["failures"] or entry["errors"] or not entry["tests"]:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
