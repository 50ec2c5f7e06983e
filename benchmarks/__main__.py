"""`python -m benchmarks COMMAND`, from the root of the repository; `--help` lists the commands."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.cases import CASES, FULL_SUITES, SUITES
from benchmarks.gpu import PARTS, PASSES, Pass, Settings, run_pass
from benchmarks.kernels.cases import CPU_KERNELS, KERNEL_CASES
from benchmarks.real import DEFAULT_ROUNDS, RealError, model_file, run_real
from benchmarks.rehearsal import has_gpu, rehearse
from benchmarks.report import ReportError, report
from benchmarks.run import run, write_record
from benchmarks.short import short_table
from benchmarks.tasks import SETTINGS, SOURCES, cells_of, measure_cells
from benchmarks.variants import Variant, variants_of

_HERE = Path(__file__).parent
_RESULTS, _README = _HERE / "results", _HERE.parent / "README.md"
_DOCS = _HERE.parent / "docs" / "benchmarks.md"
_TASKS = _HERE.parent / "docs" / "results.md"
KERNELS = "kernels"

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, 1 where a variant failed its check, 2 where it cannot be run.
    """
    args = _parser().parse_args(argv)
    try:
        return int(args.command(args))
    except (RealError, ReportError, UsageError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


class UsageError(RuntimeError):
    """The command cannot be run here."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed and memory beside PEFT.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    measure = commands.add_parser("run", help="measure cases and write a record")
    what = measure.add_mutually_exclusive_group()
    what.add_argument(
        "--suite",
        choices=sorted([*SUITES, KERNELS]),
        default="cpu",
        help="the cases of a suite (default: cpu)",
    )
    everything = [*CASES, *KERNEL_CASES]
    what.add_argument(
        "--cases", nargs="+", choices=everything, metavar="CASE", help=f"of {', '.join(everything)}"
    )
    what.add_argument(
        "--profile",
        nargs="+",
        choices=sorted(CASES),
        metavar="CASE",
        help="profile training steps instead: kernels, launch gaps, CPU operations",
    )
    measure.add_argument(
        "--full", action="store_true", help="the CPU suite's cases at the full shape of BLOOM-560m"
    )
    measure.add_argument(
        "--variants", nargs="+", default=[], metavar="NAME", help="beside PEFT only these (of steps)"
    )
    measure.add_argument("--rounds", type=_positive, metavar="N", help="timed steps of each variant")
    measure.add_argument(
        "--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)"
    )
    measure.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="leave out what is least important rather than take longer",
    )
    measure.add_argument(
        "--tiny",
        action="store_true",
        help="toy sizes: tests the runner, measures nothing; without a GPU its cases run on the CPU",
    )
    measure.add_argument("--output", type=Path, default=_RESULTS, metavar="FOLDER", help="where records go")
    measure.add_argument(
        "--commit",
        type=_name,
        metavar="NAME",
        help="what records say of the commit in a copy of the files without a repository",
    )
    measure.set_defaults(command=_run)
    render = commands.add_parser("report", help="render the newest records into the README and the docs")
    render.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[_RESULTS],
        metavar="FOLDER",
        help="where records lie",
    )
    render.add_argument(
        "--readme", type=Path, default=_README, metavar="FILE", help="file with the two markers"
    )
    render.add_argument(
        "--docs", type=Path, default=_DOCS, metavar="FILE", help="file with the two markers, for all tables"
    )
    render.add_argument("--tasks", type=Path, default=_TASKS, metavar="FILE", help="the same for `tasks`")
    render.set_defaults(command=_report)
    brief = commands.add_parser("short", help="print the main numbers of records in at most 30 lines")
    brief.add_argument(
        "records", type=Path, nargs="+", metavar="RECORD", help="JSON files or folders of them"
    )
    brief.set_defaults(command=_short)
    sweep = commands.add_parser("tune", help="sweep the launch configurations of the attention kernels")
    attentions = [name for name in KERNEL_CASES if name.startswith("attention-") and name.endswith("-both")]
    sweep.add_argument(
        "--cases", nargs="+", choices=attentions, default=attentions, metavar="CASE", help="attention cases"
    )
    sweep.add_argument("--most", type=_positive, metavar="N", help="candidates of each kernel")
    sweep.add_argument("--budget", type=float, metavar="SECONDS", help="for the whole sweep")
    sweep.add_argument("--tiny", action="store_true", help="toy sizes; on the CPU if there is no GPU")
    sweep.add_argument("--output", type=Path, default=_RESULTS, metavar="FOLDER", help="where records go")
    sweep.set_defaults(command=_tune)
    tweets = commands.add_parser(
        "real", help="train SmolLM2-135M on tweets, the first steps beside PEFT (about 15 minutes on 2 cores)"
    )
    tweets.add_argument("--model", metavar="FILE", help="another model: a .gguf file or a folder")
    tweets.add_argument(
        "--rounds", type=_positive, default=DEFAULT_ROUNDS, metavar="N", help="steps beside PEFT"
    )
    tweets.add_argument("--steps", type=_positive, metavar="N", help="of the training (default: its own)")
    tweets.add_argument("--output", type=Path, default=_RESULTS, metavar="FOLDER", help="where records go")
    tweets.set_defaults(command=_real)
    cells = commands.add_parser(
        "tasks",
        help="accuracies of a real model on real tables, run by run: hours, which may be measured in parts",
    )
    cells.add_argument("--model", metavar="FILE", help="a .gguf file or a folder (default: SmolLM2-135M)")
    cells.add_argument("--name", type=_name, metavar="NAME", help="of its records (default: of the file)")
    cells.add_argument("--tables", nargs="+", choices=list(SOURCES), default=list(SOURCES), metavar="TABLE")
    cells.add_argument(
        "--settings",
        nargs="+",
        choices=list(SETTINGS),
        default=["defaults"],
        metavar="SETTING",
        help=f"of {', '.join(map(repr, SETTINGS))} (default: defaults)",
    )
    cells.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    cells.add_argument("--minutes", type=float, metavar="N", help="begin no further run after so many")
    cells.add_argument("--output", type=Path, default=_RESULTS, metavar="FOLDER", help="where records go")
    cells.set_defaults(command=_tasks)
    whole = commands.add_parser(
        "gpu", help="passes over tests and benchmarks on a GPU, the most important first, in a given time"
    )
    passes = whole.add_mutually_exclusive_group(required=True)
    lengths = ", ".join(f"{name} ({one.seconds:g} s)" for name, one in PASSES.items())
    passes.add_argument(
        "--pass", nargs="+", dest="passes", choices=list(PASSES), metavar="PASS", help=f"of {lengths}"
    )
    passes.add_argument(
        "--part",
        nargs="+",
        dest="parts",
        choices=list(PARTS),
        metavar="PART",
        help=f"a pass of these parts, of {', '.join(PARTS)}",
    )
    whole.add_argument("--seconds", type=float, metavar="N", help="for each pass (default: its own)")
    whole.add_argument(
        "--rehearse",
        action="store_true",
        help="toy sizes on the CPU, into build/rehearsal",
    )
    whole.add_argument("--output", type=Path, metavar="FOLDER", help="where records go")
    whole.add_argument("--commit", type=_name, metavar="NAME", help="see `run`")
    whole.set_defaults(command=_gpu)
    return parser


def _run(args: argparse.Namespace) -> int:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.commit is not None:
        machine.name_commit(args.commit)
    if args.profile:
        return _profile(args)
    names = args.cases or _names_of_suite(args)
    if names[0] in KERNEL_CASES:
        return _run_kernels(args, names)
    _check_names(names, CASES)
    cases = [CASES[name] for name in names]
    device = cases[0].device
    _prepare(device, tiny=args.tiny)
    written: list[Path] = []
    record = run(
        cases,
        variants=_variants(device, args),
        rounds=args.rounds,
        tiny=args.tiny,
        budget=args.budget,
        save=_saver(args.output, written),
    )
    print(written[-1])
    checks = [variant["check"] for case in record["cases"] for variant in case["variants"]]
    return 0 if all(check is None or check["passed"] for check in checks) else 1


def _variants(device: str, args: argparse.Namespace) -> Sequence[Variant]:
    try:
        return variants_of(device, args.variants)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _names_of_suite(args: argparse.Namespace) -> Sequence[str]:
    if args.suite == KERNELS:
        return list(KERNEL_CASES) if has_gpu() or args.tiny else CPU_KERNELS
    return (FULL_SUITES if args.full else SUITES)[args.suite]


def _run_kernels(args: argparse.Namespace, names: Sequence[str]) -> int:
    from benchmarks.kernels.run import run_kernels

    _check_names(names, KERNEL_CASES)
    device = "cuda" if has_gpu() else "cpu"
    if args.tiny:
        _prepare("cuda", tiny=True)
    written: list[Path] = []
    record = run_kernels(
        [KERNEL_CASES[name] for name in names],
        device=device,
        rounds=args.rounds,
        tiny=args.tiny,
        budget=args.budget,
        save=_saver(args.output, written),
    )
    print(written[-1])
    variants = [variant for case in record["kernels"] for variant in case["variants"]]
    return 0 if all(variant["errors"] is None or variant["passed"] for variant in variants) else 1


def _profile(args: argparse.Namespace) -> int:
    from benchmarks.profiling import profile_cases

    cases = [CASES[name] for name in args.profile]
    device = cases[0].device
    if any(case.device != device for case in cases):
        raise UsageError("the cases of one profile must be of one device")
    _prepare(device, tiny=args.tiny)
    written: list[Path] = []
    save = _saver(args.output, written, name="profile.json")
    profile_cases(cases, _variants(device, args), tiny=args.tiny, save=save)
    print(written[-1])
    return 0


def _tune(args: argparse.Namespace) -> int:
    from benchmarks.tune import tune

    _prepare("cuda", tiny=args.tiny)
    written: list[Path] = []
    tune(
        [KERNEL_CASES[name] for name in args.cases],
        device="cuda" if has_gpu() else "cpu",
        tiny=args.tiny,
        most=args.most,
        budget=args.budget,
        save=_saver(args.output, written, name="tune.json"),
    )
    print(written[-1])
    return 0


def _gpu(args: argparse.Namespace) -> int:
    if not args.rehearse and not has_gpu():
        raise UsageError(
            f"torch {torch.__version__} sees no CUDA device; --rehearse runs toy sizes without one"
        )
    # Of `timeout`, say: the parts end with the pass.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    folder = args.output or (_HERE.parent / "build" / "rehearsal" if args.rehearse else _RESULTS)
    settings = Settings(folder.resolve(), args.commit, rehearsal=args.rehearse)
    own = Pass(sum(PARTS[name].seconds for name in args.parts or ()), tuple(args.parts or ()))
    passes = {name: PASSES[name] for name in args.passes} if args.passes else {"parts": own}
    codes = [
        run_pass(name, replace(one, seconds=args.seconds or one.seconds * settings.slower), settings)
        for name, one in passes.items()
    ]
    return max(codes)


def _prepare(device: str, *, tiny: bool) -> None:
    if device == "cpu" or has_gpu():
        return
    if not tiny:
        raise UsageError("these cases need a CUDA device; --tiny rehearses them on the CPU")
    rehearse()


def _check_names(names: Sequence[str], known: Any) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"steps and kernels are run apart: {', '.join(unknown)}")


def _saver(folder: Path, written: list[Path], name: str | None = None) -> Any:
    return lambda record: written.append(write_record(record, folder, name=name))


def _report(args: argparse.Namespace) -> int:
    for path in report(args.results, args.readme, args.docs, args.tasks):
        print(path)
    return 0


def _real(args: argparse.Namespace) -> int:
    steps = [] if args.steps is None else ["--steps", str(args.steps)]
    record = run_real(model=args.model, rounds=args.rounds, train_options=steps)
    print(write_record(record, args.output / "real"))
    return 0


def _tasks(args: argparse.Namespace) -> int:
    model = args.model or str(model_file())
    name = args.name or Path(model).name.split(".")[0]
    cells = list(cells_of(args.tables, args.settings, args.seeds))
    print(measure_cells(model, name, cells, args.output, minutes=args.minutes))
    return 0


def _short(args: argparse.Namespace) -> int:
    paths = [
        path
        for given in args.records
        for path in (sorted(given.glob("**/*.json")) if given.is_dir() else [given])
    ]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    records = [record for record in records if "cases" in record or "kernels" in record]
    if not records:
        raise UsageError(f"no record among {', '.join(map(str, args.records))}")
    print(short_table(records))
    return 0


def _name(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Za-z._-]+", text):
        raise argparse.ArgumentTypeError(f"expected letters, digits, '.', '_' and '-', got {text!r}")
    return text


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return number


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
