"""`softprompt demo`: the same training in plain PEFT and with softprompt.patch, side by side."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.checks import check_output_folder, require_extra
from softprompt.cli.options import (
    MAX_SEED,
    Command,
    ComputeOptions,
    given,
    number,
    option,
    whole,
)
from softprompt.cli.training_config import TrainingConfig

if TYPE_CHECKING:
    from softprompt.tasks.compare import Side

SYNTHETIC = "synthetic: a tiny model and made-up tweets"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The options of `softprompt demo`."""

    output: str = option(
        "folder for demo.png and demo.json, which are replaced if they are there",
        given,
        "FOLDER",
        default="softprompt-demo",
    )
    steps: int = option("training steps of each side", whole(10), "N", default=100)
    batch_size: int = option("rows in a step", whole(1), "N", default=8)
    learning_rate: float = option(
        "first learning rate; it falls linearly to 0", number(0, open_start=True), "RATE", default=3e-2
    )
    seed: int = option("seed of the prompt and the batches", whole(0, MAX_SEED), "N", default=42)
    device: str = option(
        "where to compute; auto takes the GPU if there is one",
        default="auto",
        choices=("auto", "cpu", "cuda"),
    )


COMMAND = Command(
    DemoConfig,
    summary="train in plain PEFT and with softprompt side by side, and draw both",
    description="Train a soft prompt twice on the same batches, once in plain PEFT and once after "
    "softprompt.patch(model), and compare accuracy, loss, time and memory. The shipped model and table "
    "are tiny and synthetic: they show that both train the same, not how fast a real model is.",
    example="softprompt demo --output softprompt-demo",
)


def run(config: DemoConfig) -> int:
    """Train the shipped tiny model both ways, print the comparison and draw it."""
    output = check_output_folder(config.output)
    require_extra()

    from softprompt.files import write_text
    from softprompt.tasks.metrics import to_json
    from softprompt.tasks.plot import draw_comparison

    plain, patched = compare(config)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "demo.json", to_json(_scores(plain, patched)))
    draw_comparison(plain, patched, output / "demo.png", title=f"Prompt tuning ({SYNTHETIC})")
    _print_comparison(plain, patched, output)
    return 0


def compare(config: DemoConfig) -> "tuple[Side, Side]":
    """Train both sides on the same seeded batches; returns (plain, patched) with everything measured."""
    # The profiler that counts memory would announce its start and end; it reads this when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from softprompt.cli.inputs import read_tables, set_up
    from softprompt.cli.models import quiet_libraries
    from softprompt.cli.progress import progress_bar
    from softprompt.cli.side_by_side import seeded_batches, two_sides
    from softprompt.tasks.compare import measure_peak_bytes, train_side_by_side
    from softprompt.tasks.inference import label_texts
    from softprompt.tasks.metrics import exact_match

    quiet_libraries()
    compute = ComputeOptions(device=config.device)
    training = TrainingConfig(positions="padded", seed=config.seed, compute=compute).with_recipe()
    training, train_table, eval_table = read_tables(training)
    table = eval_table or train_table
    setup = set_up(training, train_table, eval_table)

    def accuracy(side: "Side") -> float:
        predicted = label_texts(side.model, setup.encoder, table.rows, batch_size=32)
        return exact_match(predicted, table.labels or [])

    sides = two_sides(setup)
    batches = seeded_batches(setup, config.steps, config.batch_size)
    with progress_bar("training both", config.steps) as advance:
        for side in sides:
            side.peak_bytes = measure_peak_bytes(side.model, batches[0])
            side.accuracy_before = accuracy(side)
        train_side_by_side(sides, batches, learning_rate=config.learning_rate, progress=lambda: advance(1))
        for side in sides:
            side.accuracy_after = accuracy(side)
    return sides


def _scores(plain: "Side", patched: "Side") -> dict[str, Any]:
    from softprompt.tasks.compare import scores_of

    return {"data": SYNTHETIC, **scores_of(plain, patched)}


def _print_comparison(plain: "Side", patched: "Side", output: Path) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    scores = _scores(plain, patched)
    table = RichTable(title=f"The same training twice ({SYNTHETIC})", title_justify="left")
    for heading in ("", plain.name, patched.name, "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("accuracy before", f"{plain.accuracy_before:.1%}", f"{patched.accuracy_before:.1%}", "")
    table.add_row("accuracy after", f"{plain.accuracy_after:.1%}", f"{patched.accuracy_after:.1%}", "")
    table.add_row("last training loss", f"{plain.losses[-1]:.4f}", f"{patched.losses[-1]:.4f}", "")
    table.add_row(
        "time per step, median",
        f"{plain.median_milliseconds:.1f} ms",
        f"{patched.median_milliseconds:.1f} ms",
        f"{scores['time_ratio']:.1f}",
    )
    table.add_row(
        "peak memory of a step",
        f"{plain.peak_bytes / 2**20:.2f} MiB",
        f"{patched.peak_bytes / 2**20:.2f} MiB",
        f"{scores['memory_ratio']:.1f}",
    )
    console = Console()
    console.print(table)
    console.print(f"largest difference between the two loss curves: {scores['largest_loss_difference']:.1e}")
    console.print(
        "Model and tweets are synthetic and tiny: read the figures as an example, not as a benchmark."
    )
    console.print(f"figure: {output / 'demo.png'}")
