"""`softprompt inspect`: the tokens near a soft prompt, its norms, and how far it moved in training."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.errors import UsageError, require_extra
from softprompt.cli.options import Parser, add_command, add_prompt_options, given, whole
from softprompt.cli.paths import check_inputs, check_prompt_option, recorded_model
from softprompt.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

    from softprompt.cli.adapters import SavedPrompt
    from softprompt.prompts.inspection import Inspection

SHOWN = 3  # nearest tokens in the printed table; the files have all of them


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `softprompt inspect`."""
    parser = add_command(
        commands,
        "inspect",
        summary="show which words a trained soft prompt lies near",
        description="Show, for each virtual token of a soft prompt, the nearest tokens of the vocabulary, "
        "its length beside that of real tokens, its similarity with the others, and how far it has moved "
        "from where it started. Prints a table and writes inspection.json and inspection.png.",
        example="softprompt inspect --adapter softprompt-output",
        run=run,
    )
    add_prompt_options(parser)
    parser.add_argument(
        "--neighbours", type=whole(1), default=5, metavar="K", help="tokens to name for each virtual token"
    )
    parser.add_argument(
        "--initial",
        type=given,
        metavar="PATH",
        help="where the prompt started, a .npy file or an adapter folder (default: what `softprompt train` "
        "saved in the folder, or the words that PEFT's configuration says it started from)",
    )
    parser.add_argument(
        "--output",
        type=given,
        default="softprompt-inspection",
        metavar="FOLDER",
        help="folder for inspection.json and inspection.png, which are replaced if they are there",
    )


def run(args: argparse.Namespace) -> int:
    """Read the prompt and its model, compare, print, write."""
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file: name a folder")
    check_prompt_option("--adapter", args.adapter)
    if args.initial is not None:
        check_prompt_option("--initial", args.initial)
    check_inputs(model=args.model or recorded_model(args.adapter))
    require_extra()

    from softprompt.cli.adapters import load_base, open_prompt
    from softprompt.cli.models import load_tokenizer, quiet_libraries
    from softprompt.prompts.inspection import inspect_prompt
    from softprompt.prompts.vocabulary import vocab_size_of
    from softprompt.tasks.metrics import to_json
    from softprompt.tasks.plot import draw_inspection

    quiet_libraries()
    saved = open_prompt(args.adapter, args.model)
    base, name = load_base(saved)
    tokenizer = load_tokenizer(name)
    try:
        start, origin = _initial(args.initial, saved, base, tokenizer)
        found = inspect_prompt(
            base,
            saved.prompt,
            initial=start,
            neighbours=args.neighbours,
            vocab_size=min(len(tokenizer), vocab_size_of(base)),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    labels = _labels_found(saved, found, tokenizer)
    content = {
        "adapter": str(saved.source),
        "model": name,
        "initial_prompt": origin,
        "labels_among_nearest": labels,
        **found.to_dict(tokenizer),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "inspection.json", to_json(content))
    draw_inspection(found, tokenizer, output / "inspection.png", title=f"Soft prompt of {saved.source.name}")
    _print(content, output)
    return 0


def _initial(
    given: str | None, saved: "SavedPrompt", base: Any, tokenizer: Any
) -> "tuple[Tensor | None, str | None]":
    """Return the prompt that training started from and where it was found, or twice None."""
    from softprompt import init
    from softprompt.prompts.adapters import INITIAL_PROMPT, read_npy, read_prompt

    if given is not None:
        return read_prompt(given), given
    kept, config = saved.source / INITIAL_PROMPT, saved.config
    if kept.is_file():
        return read_npy(kept), str(kept)
    # Words can be looked up again; what PEFT drew at random cannot.
    words = None if config is None else config.prompt_tuning_init_text
    if config is None or config.prompt_tuning_init != "TEXT" or not words or config.tokenizer_kwargs:
        return None, None
    return init.text(base, len(saved.prompt), tokenizer, words), f"the words {words!r}"


def _labels_found(saved: "SavedPrompt", found: "Inspection", tokenizer: Any) -> dict[str, list[int]]:
    """Return for each label of the task the virtual tokens that have a token of it among their nearest."""
    from softprompt.prompts.inspection import near_any

    if saved.task is None:
        return {}
    result = {}
    for label in saved.task.labels:
        spellings = (label, f" {label}")
        ids = {i for word in spellings for i in tokenizer(word, add_special_tokens=False)["input_ids"]}
        result[label] = near_any(found.by_cosine, ids)
    return result


def _print(content: dict[str, Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    def line(parts: list[str]) -> Text:
        # Where the column is too narrow, a line shall end behind a token and not within one.
        return Text("  ".join(part.replace(" ", "\u00a0") for part in parts))

    moved = content["initial_prompt"] is not None
    table = RichTable(title=f"{content['adapter']}: nearest tokens by cosine", title_justify="left")
    table.add_column("", justify="right")
    table.add_column("nearest", overflow="fold")
    table.add_column("norm", justify="right")
    if moved:
        table.add_column("moved", justify="right")
        table.add_column("started near", overflow="fold")
    for entry in content["virtual_tokens"]:
        near = [f"{n['token']!r} {n['cosine']:.2f}" for n in entry["nearest_by_cosine"][:SHOWN]]
        cells = [Text(str(entry["virtual_token"])), line(near), Text(f"{entry['norm']:.3g}")]
        if moved:
            movement = entry["movement"]
            cells += [Text(f"{movement['distance']:.3g}"), line([repr(movement["initial_token"])])]
        table.add_row(*cells)
    console = Console(highlight=False)
    console.print(table)
    norms = content["vocabulary_norms"]
    console.print(
        f"norms of the model's tokens: {norms['median']:.3g} in the middle, 90 % from {norms['p05']:.3g} to "
        f"{norms['p95']:.3g}"
    )
    if moved:
        console.print(f"moved from {content['initial_prompt']}", markup=False)
    else:
        console.print(
            "nothing says where the prompt started, so nothing is said about its way: give --initial"
        )
    for label, places in content["labels_among_nearest"].items():
        where = ", ".join(map(str, places)) or "none"
        console.print(f"label {label!r} among the nearest of virtual tokens: {where}", markup=False)
    console.print(f"files: {output}/inspection.json, inspection.png", markup=False)
