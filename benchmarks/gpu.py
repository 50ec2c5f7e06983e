"""A GPU pass in parts: the extension, the tests, the benchmarks, and their report.

Each part is a process of its own, and every record is written when its case is done: a pass that is stopped
leaves what it has measured. All parts run even where one fails; then the exit code says so.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Only softprompt's kernels are looked at under the checkers, since those of PyTorch would take minutes.
SANITIZED_KERNELS = (
    "softprompt|attention_|_prompt|_pack_layout|_rows_loss|_partial_sums|_of_shares|_reduce_losses"
    "|^_rms_norm|^_glu|^_rotary"
)
PROFILED = ("gpu-article", "math", "8b")
TESTS = ("tests/gpu", "tests/ops", "tests/engine/test_host_reads.py")


@dataclass(frozen=True)
class Pass:
    """What a pass is asked for."""

    output: Path
    commit: str | None = None
    cases: Sequence[str] = ()  # of the steps; () for all of the suite
    kernels: Sequence[str] = ()  # () for all
    seconds: float | None = None  # for each part; None: its own
    rehearsal: bool = (
        False  # toy sizes on the CPU: Triton's interpreter, steps recorded by running them again
    )

    def run(self, *arguments: str) -> list[str]:
        """A command of `python -m benchmarks run`."""
        toys = ["--tiny", "--threads", "1", "--rounds", "1"] if self.rehearsal else []
        commit = [] if self.commit is None else ["--commit", self.commit]
        return [*_BENCHMARKS, "run", "--output", str(self.output), *commit, *toys, *arguments]

    def budget(self, seconds: float) -> list[str]:
        """The option that leaves out what is least important; a rehearsal leaves out nothing."""
        return [] if self.rehearsal else ["--budget", f"{self.seconds or seconds:g}"]


_PYTHON = [sys.executable]
_BENCHMARKS = [*_PYTHON, "-m", "benchmarks"]


def _extension(wanted: Pass) -> list[list[str]]:
    return [[*_PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"]]


def _tests(wanted: Pass) -> list[list[str]]:
    # They wait for the compiler most of the time, one process on each second core.
    processes = ((os.cpu_count() or 1) + 1) // 2
    workers = [] if importlib.util.find_spec("xdist") is None else ["-n", str(processes)]
    limit = ["timeout", "-s", "INT", "-k", "20", f"{wanted.seconds or 240:g}"]
    return [[*limit, *_PYTHON, "-m", "pytest", "-q", "--tb=short", "-m", "gpu", *workers, *TESTS]]


def _steps(wanted: Pass) -> list[list[str]]:
    cases = ["--cases", *wanted.cases] if wanted.cases else ["--suite", "gpu"]
    return [wanted.run(*cases, *wanted.budget(240))]


def _kernels(wanted: Pass) -> list[list[str]]:
    cases = ["--cases", *wanted.kernels] if wanted.kernels else ["--suite", "kernels"]
    return [wanted.run(*cases, *wanted.budget(90))]


def _profile(wanted: Pass) -> list[list[str]]:
    return [wanted.run("--profile", *(wanted.cases or PROFILED))]


def _tune(wanted: Pass) -> list[list[str]]:
    toys = ["--tiny", "--most", "2", "--cases", "attention-8b-both"] if wanted.rehearsal else []
    return [[*_BENCHMARKS, "tune", "--output", str(wanted.output), *toys]]


def _sanitize(wanted: Pass) -> list[list[str]]:
    checked = [*_PYTHON, "-m", "pytest", "-v", "--tb=short", "-m", "gpu", "tests/gpu/test_every_kernel.py"]
    return [
        [
            *("compute-sanitizer", "--tool", tool, "--kernel-name", f"regex={SANITIZED_KERNELS}"),
            *("--error-exitcode", "9"),
            *(("--report-api-errors", "no") if tool == "memcheck" else ()),
            *checked,
        ]
        for tool in ("memcheck", "racecheck")
    ]


def _report(wanted: Pass) -> list[list[str]]:
    committed = ROOT / "benchmarks" / "results"
    pages: list[str] = []
    results = dict.fromkeys([committed, wanted.output.resolve()])
    if wanted.rehearsal:
        results = dict.fromkeys([wanted.output])
        pages = ["--readme", str(wanted.output / "README.md"), "--docs", str(wanted.output / "benchmarks.md")]
    return [
        [*_BENCHMARKS, "report", "--results", *map(str, results), *pages],
        [*_BENCHMARKS, "short", str(wanted.output)],
    ]


# In the order of a pass.
PARTS = {
    "extension": _extension,
    "tests": _tests,
    "steps": _steps,
    "kernels": _kernels,
    "profile": _profile,
    "tune": _tune,
    "sanitize": _sanitize,
    "report": _report,
}
USUAL = ("extension", "tests", "steps", "kernels", "report")
REHEARSED = ("extension", "steps", "kernels", "profile", "tune", "report")


def run_parts(parts: Sequence[str], wanted: Pass) -> int:
    """Runs parts of a pass, all of them even where one fails.

    Returns:
        0, or 1 where a part failed.
    """
    environment = {**os.environ, "SOFTPROMPT_NATIVE": "require"}
    if wanted.rehearsal:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        shutil.rmtree(wanted.output, ignore_errors=True)
        wanted.output.mkdir(parents=True)
        for page in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md"):
            shutil.copy(page, wanted.output)
    failed = []
    for part in parts:
        # torch's allocator is off under the checkers, so that every tensor has its own bounds.
        own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if part == "sanitize" else {}
        for command in PARTS[part](wanted):
            print(f"== {part}: {' '.join(command)}", flush=True)
            if subprocess.run(command, cwd=ROOT, env=environment | own).returncode:
                failed.append(part)
    if failed:
        print(f"failed: {', '.join(dict.fromkeys(failed))}", file=sys.stderr)
    return 1 if failed else 0
