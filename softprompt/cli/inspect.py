"""`softprompt inspect`: the tokens near a soft prompt, its norms, and how far it moved in training."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.checks import (
    check_inputs,
    check_output_folder,
    check_prompt_option,
    require_extra,
    usage_errors,
)
from softprompt.cli.options import Command, PromptOptions, given, nested, option, whole
from softprompt.tasks.classification import load_task
from softprompt.tasks.folders import TASK_FILE

if TYPE_CHECKING:
    from torch import Tensor

    from softprompt.cli.models import SavedPrompt
    from softprompt.prompts.inspection import Inspection

SHOWN = 3  # nearest tokens in the printed table; the files have all of them


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """The options of `softprompt inspect`."""

    prompt: PromptOptions = nested(PromptOptions)
    neighbours: int = option("tokens to name for each virtual token", whole(1), "K", default=5)
    initial: str | None = option(
        "where the prompt started, a .npy file or an adapter folder (default: what `softprompt train` saved "
        "in the folder, or the words that PEFT's configuration says it started from)",
        given,
        "PATH",
    )
    output: str = option(
        "folder for inspection.json and inspection.png, which are replaced if they are there",
        given,
        "FOLDER",
        default="softprompt-inspection",
    )


COMMAND = Command(
    InspectConfig,
    summary="show which words a trained soft prompt lies near",
    description="Show, for each virtual token of a soft prompt, the nearest tokens of the vocabulary, "
    "its length beside that of real tokens, its similarity with the others, and how far it has moved "
    "from where it started. Prints a table and writes inspection.json and inspection.png.",
    example="softprompt inspect --adapter softprompt-output",
)


def run(config: InspectConfig) -> int:
    """Read the prompt and its model, compare, print, write."""
    adapter = config.prompt.adapter
    output = check_output_folder(config.output)
    check_prompt_option("--adapter", adapter)
    if config.initial is not None:
        check_prompt_option("--initial", config.initial)
    recorded = load_task(Path(adapter))[1] if (Path(adapter) / TASK_FILE).is_file() else None
    check_inputs(model=config.prompt.model or recorded)
    require_extra()

    from softprompt.cli.models import load_base, load_tokenizer, open_prompt, quiet_libraries
    from softprompt.files import write_text
    from softprompt.prompts.inspection import inspect_prompt
    from softprompt.prompts.vocabulary import vocab_size_of
    from softprompt.tasks.metrics import to_json
    from softprompt.tasks.plot import draw_inspection

    quiet_libraries()
    saved = open_prompt(adapter, config.prompt.model)
    base, name = load_base(saved)
    tokenizer = load_tokenizer(name)
    with usage_errors():
        start, origin = _initial(config.initial, saved, base, tokenizer)
        found = inspect_prompt(
            base,
            saved.prompt,
            initial=start,
            neighbours=config.neighbours,
            vocab_size=min(len(tokenizer), vocab_size_of(base)),
        )
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
