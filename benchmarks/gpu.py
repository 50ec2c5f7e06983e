"""A GPU pass: parts in the order of their worth, each with a limit of time, within a budget of seconds.

Every part is a process of its own. What it says is in the log, what it has measured in its record, and when
it began and ended in the timeline of the pass, all of them written at once: a pass that is stopped leaves
what it has found. A part that fails or hangs costs its own time and no other part.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.records import records_since
from benchmarks.short import short_table
from softprompt.files import write_text

ROOT = Path(__file__).resolve().parents[1]
# Only softprompt's kernels are looked at under the checkers, since those of PyTorch would take minutes.
SANITIZED_KERNELS = (
    "softprompt|attention_|_prompt|_pack_layout|_rows_loss|_partial_sums|_of_shares|_reduce_losses"
    "|^_rms_norm|^_glu|^_rotary"
)
EVERY_KERNEL = "tests/gpu/test_every_kernel.py"
TESTS = ("tests/gpu", "tests/ops", "tests/engine/test_host_reads.py")
GRACE = 10.0  # seconds from the interrupt of a part at its limit to its end by force
_START_SECONDS = 15.0  # of a part before it measures: Python, torch, the device
_POLL_SECONDS = 0.05
_LINES_OF_A_FAILURE = 15
_PYTHON = [sys.executable]
_BENCHMARKS = [*_PYTHON, "-m", "benchmarks"]


@dataclass(frozen=True)
class Settings:
    """What all parts of a pass share."""

    output: Path
    commit: str | None = None
    rehearsal: bool = False  # toy sizes on the CPU, Triton's interpreter

    @property
    def slower(self) -> float:
        """By what the seconds of passes and parts are multiplied: Triton's interpreter is slow."""
        return 20 if self.rehearsal else 1

    def environment(self) -> dict[str, str]:
        """Of every part."""
        own = {"SOFTPROMPT_NATIVE": "require", "PYTHONUNBUFFERED": "1"}
        if self.rehearsal:
            own |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        return {**os.environ, **own}


Command = Callable[[Settings, float], list[str]]  # of the settings and the seconds that it has


@dataclass(frozen=True)
class Part:
    """One process of a pass."""

    seconds: float  # its limit
    command: Command
    beside_next: bool = False  # it computes on the CPU alone, while the next part runs
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """Parts by name, and the seconds of all of them."""

    seconds: float
    parts: tuple[str, ...]


def _machine(settings: Settings, seconds: float) -> list[str]:
    return ["sh", "-c", f"nvidia-smi; {shlex.join(_PYTHON)} -m softprompt doctor"]


def _extension(settings: Settings, seconds: float) -> list[str]:
    """Built for this GPU alone, where it is not there."""
    python = shlex.join(_PYTHON)
    return [
        "sh",
        "-c",
        f"{python} -m softprompt doctor --require native && exit\n"
        "arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)\n"
        f'TORCH_CUDA_ARCH_LIST="$arch" exec {python} setup.py --quiet build_ext --inplace',
    ]


def _tests(*paths: str) -> Command:
    def command(settings: Settings, seconds: float) -> list[str]:
        # A name for each test that has passed: the log of a part that was stopped says how far it came.
        pytest = [*_PYTHON, "-m", "pytest", "-v", "--tb=short"]
        if settings.rehearsal:
            return [*pytest, "-k", "pack_layout", *paths]
        # They wait for the compiler most of the time, one process on each second core.
        processes = ((os.cpu_count() or 1) + 1) // 2
        workers = [] if importlib.util.find_spec("xdist") is None else ["-n", str(processes)]
        return [*pytest, "-m", "gpu", *workers, *paths]

    return command


def _run(*words: str) -> Command:
    """A command of `python -m benchmarks run`; a rehearsal leaves out nothing for lack of time."""

    def command(settings: Settings, seconds: float) -> list[str]:
        commit = [] if settings.commit is None else ["--commit", settings.commit]
        time_for_it = ["--budget", f"{max(seconds - _START_SECONDS, 1):g}"]
        toys = ["--tiny", "--threads", "1", "--rounds", "1"]
        chosen = toys if settings.rehearsal else time_for_it
        return [*_BENCHMARKS, "run", *words, "--output", str(settings.output), *commit, *chosen]

    return command


def _tune(settings: Settings, seconds: float) -> list[str]:
    toys = ["--tiny", "--most", "2", "--cases", "attention-8b-both"]
    time_for_it = ["--budget", f"{max(seconds - _START_SECONDS, 1):g}"]
    chosen = toys if settings.rehearsal else time_for_it
    return [*_BENCHMARKS, "tune", "--output", str(settings.output), *chosen]


def _machine_code(settings: Settings, seconds: float) -> list[str]:
    options = ["--architectures", "90", "--output", str(settings.output / "compile")]
    options += ["--most", "1"] if settings.rehearsal else []
    modules = ("benchmarks.attention_kernels", "benchmarks.elementwise_kernels")
    return ["sh", "-c", " && ".join(shlex.join([*_PYTHON, "-m", module, *options]) for module in modules)]


def _sanitizer(tool: str, *options: str) -> Part:
    def command(settings: Settings, seconds: float) -> list[str]:
        return [
            *("compute-sanitizer", "--tool", tool, "--kernel-name", f"regex={SANITIZED_KERNELS}"),
            *("--error-exitcode", "9", *options),
            *(*_PYTHON, "-m", "pytest", "-v", "--tb=short", "-m", "gpu", EVERY_KERNEL),
        ]

    # torch's allocator is off, so that every tensor has its own bounds.
    return Part(300, command, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


# PEFT, the patch, and the fastest of what others offer that is there at once.
_AT_ONCE = ("--variants", "softprompt eager", "softprompt graph", "peft+chunked")
_OURS = ("--variants", "softprompt eager", "softprompt graph")
_COMPILED = (*_AT_ONCE, "softprompt compile+graph")
_KERNELS = (
    *(f"head-bloom-560m-{rows}" for rows in (8, 128, 1024)),
    *("attention-article-both", "attention-8b-both"),
    *("embed-article", "embed-135mb", "layout-article", "layout-65536"),
    *("norm-llama-8b", "glu-llama-8b", "rotary-llama-8b"),
)
PARTS = {
    "machine": Part(60, _machine),
    "extension": Part(120, _extension, beside_next=True),
    "every-kernel": Part(90, _tests(EVERY_KERNEL)),
    "bloom": Part(120, _run("--cases", "gpu-article", "gpu-paper", "ensemble", "generate-bloom", *_AT_ONCE)),
    "llama": Part(130, _run("--cases", "8b", "math", *_AT_ONCE)),
    "kernels": Part(90, _run("--cases", *_KERNELS)),
    "profile": Part(60, _run("--profile", "gpu-article", "8b", *_OURS)),
    "compiled": Part(200, _run("--cases", "gpu-article", "8b", *_COMPILED)),
    "machine-code": Part(120, _machine_code, beside_next=True, environment={"TRITON_INTERPRET": "0"}),
    "tests": Part(130, _tests(*TESTS)),
    "other-steps": Part(180, _run("--cases", "math-half", "long-8", "generate-llama", "long", *_AT_ONCE)),
    "peers": Part(180, _run("--cases", "gpu-article", "8b")),
    "all-kernels": Part(120, _run("--suite", "kernels")),
    "tune": Part(200, _tune),
    "memcheck": _sanitizer("memcheck", "--report-api-errors", "no"),
    "racecheck": _sanitizer("racecheck"),
}
PASSES = {
    "first": Pass(
        570,
        ("machine", "extension", "every-kernel", "bloom", "llama", "kernels", "profile", "compiled"),
    ),
    "second": Pass(150, ("machine-code", "tests")),
    "third": Pass(570, ("extension", "every-kernel", "other-steps", "peers", "all-kernels", "tune")),
    "sanitize": Pass(570, ("memcheck", "racecheck")),
}


@dataclass
class Entry:
    """A part in the timeline of a pass, in seconds since the pass began."""

    part: str
    began: float
    ended: float | None
    limit: float
    outcome: str


class Timeline:
    """What has run when: printed, and written to a file at every change."""

    def __init__(self, path: Path, seconds: float, settings: Settings) -> None:
        self._path, self._seconds = path, seconds
        self._began = time.monotonic()
        self.head = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": settings.commit,
            "rehearsal": settings.rehearsal,
            "seconds": seconds,
        }
        self.entries: list[Entry] = []
        self._write()

    def now(self) -> float:
        """Seconds since the pass began."""
        return time.monotonic() - self._began

    def left(self) -> float:
        """Seconds that a part may take, the grace of one that hangs aside."""
        return self._seconds - self.now() - GRACE

    def begin(self, part: str, limit: float) -> Entry:
        """Adds a part that runs now."""
        return self._add(Entry(part, self.now(), None, limit, "running"))

    def leave_out(self, part: str, limit: float, left: float) -> None:
        """Adds a part that would not fit."""
        reason = f"left out: {max(left, 0):.0f} s are left, it may take {limit:.0f} s"
        now = self.now()
        self._add(Entry(part, now, now, limit, reason))

    def end(self, entry: Entry, outcome: str) -> None:
        """Says what came of a part that ran."""
        entry.ended, entry.outcome = self.now(), outcome
        self._write()
        self._say(entry)

    def _add(self, entry: Entry) -> Entry:
        self.entries.append(entry)
        self._write()
        self._say(entry)
        return entry

    def _say(self, entry: Entry) -> None:
        print(f"[{self.now():6.1f} s] {entry.part}: {entry.outcome}", flush=True)

    def _write(self) -> None:
        text = json.dumps(self.head | {"parts": [asdict(entry) for entry in self.entries]}, indent=1)
        write_text(self._path, text + "\n")


def _hear_interrupts() -> None:
    """What a shell runs in the background ignores them, and so does what that begins."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class _Running:
    """The process of a part."""

    def __init__(self, name: str, limit: float, settings: Settings, timeline: Timeline, log: Path) -> None:
        part, self._timeline, self._log = PARTS[name], timeline, log
        command = part.command(settings, limit)
        self._entry = timeline.begin(name, limit)
        self.done = self._interrupted = False
        self._process: subprocess.Popen[bytes] | None = None
        with log.open("ab") as file:
            file.write(f"== {name}: {shlex.join(command)}\n".encode())
            file.flush()
            self._offset = file.tell()
            try:
                # A group, to be killed with all that it begins; not a session, which outlives a killed pass.
                self._process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=settings.environment() | part.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                    preexec_fn=_hear_interrupts,
                )
            except OSError as error:
                file.write(f"{error}\n".encode())

    def ended(self) -> bool:
        """Whether the process has ended, by itself or at its limit; then the timeline says how."""
        if self._process is None:
            self._close("failed: it could not be begun")
            return True
        code = self._process.poll()
        late = self._timeline.now() - self._entry.began - self._entry.limit
        if code is None and late >= 0 and not self._interrupted:
            self._process.send_signal(signal.SIGINT)  # pytest then sums up, and a benchmark closes its files
            self._interrupted = True
        if code is None and late < GRACE:
            return False
        self.kill()
        if self._interrupted:
            self._close(f"stopped at its limit of {self._entry.limit:.0f} s")
        elif code:
            self._close(f"failed: {code}")
        else:
            self.done = True
            self._timeline.end(self._entry, "done")
        return True

    def kill(self) -> None:
        """Ends the process, and those that it has begun."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it
                self._process.wait(GRACE)

    def _close(self, outcome: str) -> None:
        self._timeline.end(self._entry, outcome)
        with self._log.open("rb") as file:
            file.seek(self._offset)
            said = file.read().decode(errors="replace").splitlines()
        print("\n".join(f"    {line[:200]}" for line in said[-_LINES_OF_A_FAILURE:]), flush=True)


def _wait_for(running: list[_Running]) -> None:
    """Until all have ended; those that run stay in the list."""
    while running:
        time.sleep(_POLL_SECONDS)
        running[:] = [one for one in running if not one.ended()]


def run_pass(name: str, wanted: Pass, settings: Settings) -> int:
    """Runs the parts of a pass, all of them even where one fails.

    A part that finds half of its seconds left, or more, runs with what is left; another is left out.

    Writes `pass-<name>.log` and `pass-<name>.json`, the timeline, beside the records of the parts.

    Args:
        name: of the pass.
        wanted: its parts and seconds.
        settings: of all parts.

    Returns:
        0, or 1 where a part failed or was stopped at its limit.
    """
    output = settings.output
    output.mkdir(parents=True, exist_ok=True)
    log = output / f"pass-{name}.log"
    log.write_text("", encoding="utf-8")
    print(f"pass {name}: {wanted.seconds:.0f} s, {log}", flush=True)
    timeline = Timeline(output / f"pass-{name}.json", wanted.seconds, settings)
    begun: list[_Running] = []
    running: list[_Running] = []
    try:
        for part in wanted.parts:
            left = timeline.left()
            limit = min(PARTS[part].seconds * settings.slower, wanted.seconds)
            if left < limit / 2:
                timeline.leave_out(part, limit, left)
                continue
            begun.append(_Running(part, min(limit, left), settings, timeline, log))
            running.append(begun[-1])
            if not PARTS[part].beside_next:
                _wait_for(running)
        _wait_for(running)
    finally:
        for one in running:
            one.kill()
    records = records_since(output, timeline.head["date"])
    if records:
        print(short_table(records))
    return 0 if all(one.done for one in begun) else 1
