"""`softprompt sweep`: what a soft prompt owes to its length, its start and the settings of its training."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.errors import UsageError, require_extra
from softprompt.cli.initial import check_init_options
from softprompt.cli.options import Parser, add_command, add_compute_options, given, whole
from softprompt.cli.paths import check_inputs
from softprompt.cli.run_options import add_data_options, add_model_options, add_training_options, apply_recipe
from softprompt.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

    from softprompt.cli.sweep_runs import Sweep
    from softprompt.tasks.sweep import Run

FIELDS = (
    "num-virtual-tokens",
    "init",
    "init-text",
    "learning-rate",
    "epochs",
    "steps",
    "batch-size",
    "schedule",
    "optimizer",
    "weight-decay",
)


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `softprompt sweep`."""
    parser = add_command(
        commands,
        "sweep",
        summary="train soft prompts of several lengths, starts or learning rates, and compare them",
        description="Train one soft prompt for every combination of settings, several times each, and write "
        "a table and a picture of what the settings are worth. Runs that fit into one batch are trained "
        "together. Finished runs are kept: the same command, or one with more values, does only what is "
        "missing.",
        example="softprompt sweep --over num-virtual-tokens 1 4 16 --over init random vocab labels",
        run=run,
    )
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument(
        "--over",
        required=True,
        action="append",
        nargs="+",
        metavar=("FIELD", "VALUE"),
        help="an option to vary and its values; given several times, all combinations are trained. "
        f"The fields are {', '.join(FIELDS)}",
    )
    sweep.add_argument(
        "--seeds",
        type=whole(1),
        default=3,
        metavar="N",
        help="runs of each setting: with --seed and the numbers after it, for the prompt and the row order",
    )
    sweep.add_argument(
        "--together",
        type=whole(1),
        default=8,
        metavar="N",
        help="runs to train in one batch at most: more are faster and take more memory; 1 trains one by "
        "one, as --fp16 always does: its loss scale would be one for all of them",
    )
    add_data_options(parser)
    add_model_options(parser)
    add_training_options(parser)
    add_compute_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=given,
        default="softprompt-sweep",
        metavar="FOLDER",
        help="folder for sweep.csv, sweep.json, sweep.png, and the adapter of each run; finished runs in it "
        "are used again",
    )


def run(args: argparse.Namespace) -> int:
    """Check what was asked, train what is missing, write the table and the picture."""
    over = parse_over(args.over)
    for name in over:
        option = "--" + name.replace("_", "-")
        if option in {argument.split("=")[0] for argument in args.argv}:
            raise UsageError(f"{option} is what --over varies: leave the option out")
    if {"epochs", "steps"} <= {*over, *(["steps"] if args.steps else [])}:
        raise UsageError("--over epochs means nothing beside steps, which count more: give one of them")
    if "init_text" in over and not {"text", "text-once"} & set(over.get("init", [args.init])):
        raise UsageError("--over init-text varies the words of --init text, which no run starts from")
    apply_recipe(args)
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file: name a folder")
    _check_fields(output, list(over))
    for values in _all_values(args, over):
        check_init_options(values)
    check_inputs(tables=[args.data, args.eval_data], model=args.model)
    require_extra()

    from softprompt.cli.models import quiet_libraries
    from softprompt.cli.sweep_runs import Sweep
    from softprompt.tasks.folders import held

    quiet_libraries()
    sweep = Sweep(args, over)
    starts = sweep.starts(sweep.missing())
    with held(output):
        _check_fields(output, list(over))  # again: another sweep may have ended in the meantime
        return _train(args, over, sweep, starts, output)


def _train(
    args: argparse.Namespace,
    over: dict[str, list[Any]],
    sweep: "Sweep",
    starts: "dict[str, Tensor | None]",
    output: Path,
) -> int:
    from softprompt.tasks.sweep import summary_of, table_of

    start = time.perf_counter()
    sweep.say_rows()
    missing = sweep.missing()
    try:
        sweep.train(missing, starts)
    except KeyboardInterrupt:
        done = len(sweep.runs) - len(sweep.missing())
        print(
            f"softprompt: interrupted; {done} of {len(sweep.runs)} runs are done and kept in {output}: the "
            "same command goes on with the others",
            file=sys.stderr,
        )
        return 130
    rows = table_of(sweep.runs, sweep.records())
    summary = summary_of(rows, list(over))
    _write(args, sweep.describe(), rows, summary, list(over), output)
    _print(summary, list(over), output)
    seconds = time.perf_counter() - start
    print(f"{len(rows)} runs, {len(rows) - len(missing)} of them done before, in {seconds:.1f} s")
    return 0


def _check_fields(output: Path, over: list[str]) -> None:
    """Raise UsageError where the folder has the table of a sweep over other fields."""
    from softprompt.tasks.sweep import fields_of

    known = fields_of(output / "sweep.json")
    if known is not None and set(known) != set(over):
        there, wanted = (", ".join(name.replace("_", "-") for name in names) for names in (known, over))
        raise UsageError(
            f"{output} has the table of a sweep over {there}, which one over {wanted} would replace: "
            "name another folder with --output"
        )


def parse_over(given: list[list[str]]) -> dict[str, list[Any]]:
    """Return the values of each field, checked and converted like those of the option of its name.

    Raises:
        UsageError: an unknown field, no values, a value that the option refuses, or something twice.
    """
    parser = Parser(prog="softprompt sweep", add_help=False, allow_abbrev=False)
    add_model_options(parser)
    add_training_options(parser)
    add_compute_options(parser)
    over: dict[str, list[Any]] = {}
    for field, *texts in given:
        name, option = field.lstrip("-").replace("-", "_"), field.lstrip("-").replace("_", "-")
        if option not in FIELDS:
            raise UsageError(f"--over {field}: no such field; expected one of {', '.join(FIELDS)}")
        if name in over:
            raise UsageError(f"--over {field} is given twice: name all of its values at once")
        if not texts:
            raise UsageError(f"--over {field}: name the values behind it")
        values = [getattr(parser.parse_args([f"--{option}={text}"]), name) for text in texts]
        if len(set(values)) < len(values):
            raise UsageError(f"--over {field}: a value is there twice: {' '.join(texts)}")
        over[name] = values
    return over


def _all_values(args: argparse.Namespace, over: dict[str, list[Any]]) -> list[argparse.Namespace]:
    from softprompt.tasks.sweep import grid

    return [with_values(args, run) for run in grid(over, [args.seed], {})]


def with_values(args: argparse.Namespace, run: "Run") -> argparse.Namespace:
    """Return the arguments with the values and the seed of one run in them."""
    values = {**vars(args), **run.values, "seed": run.seed}
    if "init" in run.values and values["init"] != "saved":
        values |= {"init_from": None, "init_other_base": False}
    return argparse.Namespace(**values)


def _write(
    args: argparse.Namespace,
    described: dict[str, Any],
    rows: list[dict[str, Any]],
    summary: list[dict[str, Any]],
    fields: list[str],
    output: Path,
) -> None:
    import pandas as pd

    from softprompt.tasks.metrics import to_json
    from softprompt.tasks.sweep_plot import draw_sweep

    content = {**described, "over": fields, "settings": summary, "runs": rows}
    for name, text in (
        ("sweep.json", to_json(content)),
        ("sweep.csv", pd.DataFrame(rows).to_csv(index=False)),
    ):
        write_text(output / name, text)
    draw_sweep(rows, fields, output / "sweep.png", title=described["title"])


def _print(summary: list[dict[str, Any]], fields: list[str], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    from softprompt.tasks.sweep import best_setting

    def shown(spread: dict[str, float | None] | None, form: str) -> str:
        if spread is None:
            return "diverged"
        deviation = spread["std"]
        return format(spread["mean"], form) + ("" if deviation is None else f" ± {deviation:{form}}")

    table = RichTable(title="Evaluation rows: mean ± standard deviation over the seeds", title_justify="left")
    for field in fields:
        table.add_column(field.replace("_", "-"), overflow="fold")
    for heading in ("runs", "accuracy", "loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = best_setting(summary)
    for entry in summary:
        lost = f" ({entry['diverged']} diverged)" if entry["diverged"] else ""
        table.add_row(
            *(Text(str(entry[field])) for field in fields),
            f"{entry['runs']}{lost}",
            shown(entry["eval_exact_match"], ".1%"),
            shown(entry["eval_loss"], ".4f"),
            style="bold" if entry is best else "",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(f"files: {output}/sweep.csv, sweep.json, sweep.png", markup=False)
