"""The options of one training run, which `softprompt train` and `softprompt sweep` share."""

import argparse

from softprompt.cli.initial import add_init_options
from softprompt.cli.options import MAX_SEED, Parser, given, number, whole
from softprompt.cli.table_options import add_table_options, template_text

RECIPES = {
    "paper": {
        "optimizer": "adafactor",
        "learning_rate": 0.3,
        "schedule": "constant",
        "num_virtual_tokens": 100,
        "weight_decay": 1e-5,
    }
}


def add_data_options(parser: Parser) -> None:
    """Add the options that name the rows, as a group of their own."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        type=given,
        metavar="TABLE",
        help="training table: a .csv, .jsonl or .parquet file, a data set folder, or a data set name "
        "(default: the shipped table)",
    )
    data.add_argument(
        "--text-column", type=given, default="Tweet text", metavar="NAME", help="column with the texts"
    )
    data.add_argument(
        "--label-column", type=given, default="Label", metavar="NAME", help="column with the labels to learn"
    )
    data.add_argument(
        "--eval-data",
        type=given,
        metavar="TABLE",
        help="table to measure the accuracy on; without it, a share of the training table is kept for that",
    )
    data.add_argument(
        "--eval-share",
        type=number(0, 1),
        default=0.2,
        metavar="SHARE",
        help="share of every label's rows to measure on if --eval-data is not given; 0 measures nothing",
    )
    add_table_options(data)


def add_model_options(parser: Parser) -> argparse._ArgumentGroup:
    """Add the options of the model, the prompt and its input, as a group of their own; returns it."""
    prompt = parser.add_argument_group("model and prompt")
    prompt.add_argument(
        "--model",
        type=given,
        metavar="NAME",
        help="the frozen causal language model: a folder or a model name (default: the shipped tiny model)",
    )
    prompt.add_argument(
        "--num-virtual-tokens", type=whole(1), default=8, metavar="P", help="length of the soft prompt"
    )
    add_init_options(prompt)
    prompt.add_argument(
        "--template",
        type=template_text,
        default="{text_column} : {text} Label : ",
        help="how a row is put before the model; the label is written behind it. {text} is the text, "
        "{text_column} the name of its column, and any other name in braces the cell of that column; {{ and "
        "}} are braces, \\n is a new line, \\t a tab, \\\\ a backslash",
    )
    prompt.add_argument(
        "--max-length",
        type=whole(1),
        default=64,
        metavar="N",
        help="longest row in tokens, label included; a longer text loses its end",
    )
    prompt.add_argument(
        "--padding",
        choices=("max_length", "longest"),
        default="max_length",
        help="fill every row up to --max-length, or only up to the longest row of its batch",
    )
    prompt.add_argument(
        "--end-token",
        choices=("pad", "eos"),
        help="the token to learn after a label (default: pad; eos for the shipped tiny model)",
    )
    prompt.add_argument(
        "--positions",
        choices=("compact", "padded"),
        help="whether pads count for the positions of a row: compact trains what a row is alone, and "
        "predictions are made on rows without padding; padded is what PEFT does (default: compact; padded "
        "with --no-patch, and for models that softprompt cannot run otherwise)",
    )
    return prompt


def add_training_options(parser: Parser) -> argparse._ArgumentGroup:
    """Add the options of the optimizer and its way, as a group of their own; returns it."""
    training = parser.add_argument_group("training")
    training.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        help="settings that belong together; options given beside it count more. paper: Adafactor, constant "
        "learning rate 0.3, 100 virtual tokens, weight decay 1e-5 (Lester et al. 2021)",
    )
    training.add_argument("--epochs", type=whole(1), default=10, metavar="N", help="passes over the table")
    training.add_argument(
        "--steps",
        type=whole(1),
        metavar="N",
        help="training steps, in the place of --epochs: the last pass may end early",
    )
    training.add_argument(
        "--learning-rate",
        type=number(0, open_start=True),
        default=3e-2,
        metavar="RATE",
        help="first learning rate",
    )
    training.add_argument(
        "--schedule",
        choices=("linear", "constant"),
        default="linear",
        help="whether the learning rate falls linearly to 0 or stays as it is",
    )
    training.add_argument(
        "--optimizer", choices=("adamw", "adafactor"), default="adamw", help="optimizer of the prompt"
    )
    training.add_argument(
        "--weight-decay", type=number(0), default=0.01, metavar="RATE", help="weight decay of the optimizer"
    )
    training.add_argument(
        "--seed",
        type=whole(0, MAX_SEED),
        default=42,
        metavar="N",
        help="seed of the split, the prompt and the row order",
    )
    return training


def apply_recipe(args: argparse.Namespace) -> None:
    """Set what `--recipe` says, except for the options that were given."""
    given = {argument.split("=")[0] for argument in args.argv}
    for name, value in RECIPES.get(args.recipe, {}).items():
        if "--" + name.replace("_", "-") not in given:
            setattr(args, name, value)
