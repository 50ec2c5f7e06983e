"""The options that say where a soft prompt starts, and the prompt that they ask for."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.errors import UsageError
from softprompt.cli.options import given, words
from softprompt.cli.paths import check_prompts
from softprompt.tasks.folders import adapter_folders

if TYPE_CHECKING:
    from torch import Tensor

    from softprompt.tasks.table import Table

DEFAULT_INIT_TEXT = "Classify if the tweet is a complaint or not:"
# Those that PEFT makes itself; the others replace its random prompt.
PEFT_INITS = {"text": "TEXT", "vocab": "SAMPLE_VOCAB", "random": "RANDOM"}
INITS = ("text", "text-once", "labels", "common", "counted", "vocab", "matched", "uniform", "random", "saved")


def add_init_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that say where a soft prompt starts."""
    group.add_argument(
        "--init",
        choices=INITS,
        default="text",
        help="where the soft prompt starts: at the words of --init-text, repeated to its length (text) or "
        "once (text-once); at the label words (labels); at random ones of the 5,000 tokens with the smallest "
        "numbers (common), of the 5,000 most frequent tokens of the training texts (counted), or of all "
        "tokens (vocab); at random numbers that resemble the model's tokens (matched), lie between -0.5 and "
        "0.5 (uniform), or are normal with variance 1 (random); or at --init-from (saved). Behind the words "
        "of text-once and labels stand tokens of common",
    )
    group.add_argument(
        "--init-text",
        type=words,
        default=DEFAULT_INIT_TEXT,
        metavar="TEXT",
        help="the words for --init text and text-once",
    )
    group.add_argument(
        "--init-from",
        type=given,
        metavar="PATH",
        help="the prompt for --init saved: the folder of an adapter of the same model (of an ensemble with "
        "as many prompts for --ensemble), or a .npy file [P, H]",
    )
    group.add_argument(
        "--init-other-base",
        action="store_true",
        help="let --init-from name an adapter of another model, such as a variant of this one",
    )


def check_init_options(args: argparse.Namespace) -> None:
    """Raise UsageError where the options contradict each other, or there is no prompt to start from."""
    if args.init in ("text", "text-once") and not args.init_text.strip():
        raise UsageError(f"--init {args.init} needs words to start from: give --init-text, or --init vocab")
    if args.init == "saved" and not args.init_from:
        raise UsageError("--init saved needs a prompt to start from: give --init-from")
    if args.init != "saved" and (args.init_from or args.init_other_base):
        option = "--init-from" if args.init_from else "--init-other-base"
        raise UsageError(f"{option} belongs to --init saved, but --init is {args.init}")
    if args.init == "saved" and not getattr(args, "resume", False):  # a checkpoint holds the prompt
        try:
            check_prompts(args.init_from)
        except ValueError as error:
            raise UsageError(f"--init saved: {error}") from error


def initial_prompt(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    table: "Table",
    *,
    number: int = 0,
    count: int = 1,
) -> "Tensor | None":
    """Return the [P, H] prompt of `--init` for a model and the training rows, None where PEFT makes it.

    It is the one with this `number`, from 0, of the `count` prompts of an ensemble.

    Raises:
        UsageError: it cannot be made, with the reason.
    """
    if args.init in PEFT_INITS:
        return None
    try:
        if args.init == "saved":
            return _saved(args, model, number, count)
        return _make(args, model, tokenizer, table, args.seed + number)
    except ValueError as error:
        raise UsageError(f"--init {args.init}: {error}") from error


def _make(args: argparse.Namespace, model: Any, tokenizer: Any, table: "Table", seed: int) -> "Tensor":
    from softprompt import init

    length = args.num_virtual_tokens
    match args.init:
        case "text-once":
            return init.text(model, length, tokenizer, args.init_text, tile=False, seed=seed)
        case "labels":
            return init.class_labels(model, length, tokenizer, table.known_labels(), seed=seed)
        case "common":
            return init.common_tokens(model, length, seed=seed)
        case "counted":
            counts = init.count_tokens(model, tokenizer, table.texts)
            return init.common_tokens(model, length, counts=counts, seed=seed)
        case "matched":
            return init.matched(model, length, seed=seed)
        case "uniform":
            return init.uniform(model, length, seed=seed)
    raise UsageError(f"--init {args.init} is not one of {', '.join(INITS)}")


def _saved(args: argparse.Namespace, model: Any, number: int, count: int) -> "Tensor":
    """Return the prompt that `--init-from` names, from an ensemble the one with this number."""
    from softprompt import init

    length, source = args.num_virtual_tokens, Path(args.init_from)
    if not source.is_dir():
        return init.from_file(model, source, num_virtual_tokens=length)
    folders = adapter_folders(source)
    if len(folders) > 1 and len(folders) != count:
        raise ValueError(
            f"{source} holds an ensemble of {len(folders)} prompts, and prompts to train: {count}; give "
            f"--ensemble {len(folders)}, or the folder of one of them"
        )
    folder = folders[number] if len(folders) > 1 else source
    return init.from_adapter(model, folder, num_virtual_tokens=length, other_base=args.init_other_base)
