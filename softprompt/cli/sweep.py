"""`softprompt sweep`: what a soft prompt owes to its length, its start and the settings of its training."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.checks import UsageError, check_inputs, check_output_folder, require_extra
from softprompt.cli.options import Command, option_name
from softprompt.cli.sweep_config import SweepConfig, parse_over
from softprompt.cli.training_config import options_in

if TYPE_CHECKING:
    from softprompt.cli.sweep_runs import Sweep


COMMAND = Command(
    SweepConfig,
    summary="train soft prompts of several lengths, starts or learning rates, and compare them",
    description="Train one soft prompt for every combination of settings, several times each, and write "
    "a table and a picture of what the settings are worth. Runs that fit into one batch are trained "
    "together. Finished runs are kept: the same command, or one with more values, does only what is "
    "missing.",
    example="softprompt sweep --over num-virtual-tokens 1 4 16 --over init random vocab labels",
)


def run(config: SweepConfig) -> int:
    """Check what was asked, train what is missing, write the table and the picture."""
    over, training = parse_over(config.over), config.training
    for name in over:
        if option_name(name) in options_in(training.argv):
            raise UsageError(f"{option_name(name)} is what --over varies: leave the option out")
    if {"epochs", "steps"} <= {*over, *(["steps"] if training.steps else [])}:
        raise UsageError("--over epochs means nothing beside steps, which count more: give one of them")
    if "init_text" in over and not {"text", "text-once"} & set(over.get("init", [training.init or "text"])):
        raise UsageError("--over init-text varies the words of --init text, which no run starts from")
    training = training.with_recipe()
    output = check_output_folder(config.output)
    _check_fields(output, list(over))

    from softprompt.tasks.sweep import grid, summary_of, table_of

    for setting in grid(over, [training.seed], {}):
        training.with_values(setting.values).check()
    check_inputs(training.data, training.eval_data, model=training.model)
    require_extra()

    from softprompt.cli.models import quiet_libraries
    from softprompt.cli.notes import say_rows
    from softprompt.cli.sweep_runs import Sweep
    from softprompt.tasks.folders import held

    quiet_libraries()
    sweep = Sweep(training, config, over)
    starts = sweep.starts(sweep.missing())
    with held(output):
        _check_fields(output, list(over))  # again: another sweep may have ended in the meantime
        start = time.perf_counter()
        say_rows(sweep.setup)
        missing = sweep.missing()
        try:
            sweep.train(missing, starts)
        except KeyboardInterrupt:
            done = len(sweep.runs) - len(sweep.missing())
            print(
                f"softprompt: interrupted; {done} of {len(sweep.runs)} runs are done and kept in {output}: "
                "the same command goes on with the others",
                file=sys.stderr,
            )
            return 130
        rows = table_of(sweep.runs, sweep.records())
        summary = summary_of(rows, list(over))
        _write(sweep, rows, summary, list(over), output)
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


def _write(
    sweep: "Sweep",
    rows: list[dict[str, Any]],
    summary: list[dict[str, Any]],
    fields: list[str],
    output: Path,
) -> None:
    import pandas as pd

    from softprompt.files import write_text
    from softprompt.tasks.metrics import to_json
    from softprompt.tasks.sweep_plot import draw_sweep

    described = sweep.describe()
    write_text(
        output / "sweep.json", to_json({**described, "over": fields, "settings": summary, "runs": rows})
    )
    write_text(output / "sweep.csv", pd.DataFrame(rows).to_csv(index=False))
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
