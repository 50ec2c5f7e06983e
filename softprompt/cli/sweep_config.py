"""The options of a sweep: those of a training run, and the values that some of them take."""

from dataclasses import dataclass
from typing import Any

from softprompt.cli.checks import UsageError
from softprompt.cli.options import Parser, add_options, given, nested, option, option_name, whole
from softprompt.cli.training_config import NOT_SWEPT, TrainingConfig

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


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The options of `softprompt sweep`: those of a run, and the grid."""

    over: list[list[str]] = option(
        "an option to vary and its values; given several times, all combinations are trained. The fields are "
        f"{', '.join(FIELDS)}",
        metavar=("FIELD", "VALUE"),
        required=True,
        action="append",
        nargs="+",
        group="sweep",
    )
    seeds: int = option(
        "runs of each setting: with --seed and the numbers after it, for the prompt and the row order",
        whole(1),
        "N",
        default=3,
    )
    together: int = option(
        "runs to train in one batch at most: more are faster and take more memory; 1 trains one by one, as "
        "--fp16 always does: its loss scale would be one for all of them",
        whole(1),
        "N",
        default=8,
    )
    training: TrainingConfig = nested(
        TrainingConfig, without=(*NOT_SWEPT, "max_new_tokens", "output", "overwrite", "resume")
    )
    output: str = option(
        "folder for sweep.csv, sweep.json, sweep.png, and the adapter of each run; finished runs in it are "
        "used again",
        given,
        "FOLDER",
        default="softprompt-sweep",
        group="output",
    )


def parse_over(given: list[list[str]]) -> dict[str, list[Any]]:
    """Return the values of each field, checked and converted like those of the option of its name.

    Raises:
        UsageError: an unknown field, no values, a value that the option refuses, or something twice.
    """
    parser = Parser(prog="softprompt sweep", add_help=False, allow_abbrev=False)
    add_options(parser, TrainingConfig)
    over: dict[str, list[Any]] = {}
    for field, *texts in given:
        name = field.lstrip("-").replace("-", "_")
        if name.replace("_", "-") not in FIELDS:
            raise UsageError(f"--over {field}: no such field; expected one of {', '.join(FIELDS)}")
        if name in over:
            raise UsageError(f"--over {field} is given twice: name all of its values at once")
        if not texts:
            raise UsageError(f"--over {field}: name the values behind it")
        values = [getattr(parser.parse_args([f"{option_name(name)}={text}"]), name) for text in texts]
        if len(set(values)) < len(values):
            raise UsageError(f"--over {field}: a value is there twice: {' '.join(texts)}")
        over[name] = values
    return over
