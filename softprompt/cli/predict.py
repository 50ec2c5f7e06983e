"""`softprompt predict`: labels for new rows."""

import argparse
import time
from pathlib import Path
from typing import Any

from softprompt.cli.errors import UsageError, require_extra
from softprompt.cli.options import Parser, add_command, add_compute_options, given
from softprompt.cli.paths import check_adapters, check_inputs, check_model
from softprompt.cli.table_options import add_table_options, table_arguments
from softprompt.tasks.classification import load_task
from softprompt.tasks.folders import adapter_folders


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `softprompt predict`."""
    parser = add_command(
        commands,
        "predict",
        summary="label new rows with a trained soft prompt",
        description="Label the rows of a table with an adapter that `softprompt train` wrote. The output has "
        "the columns of the table and one more with the labels.",
        example="softprompt predict --adapter complaints --data new_tweets.csv --output labelled.csv",
        run=run,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--adapter", type=given, required=True, metavar="FOLDER", help="folder that `softprompt train` wrote"
    )
    data.add_argument(
        "--data",
        type=given,
        required=True,
        metavar="TABLE",
        help="rows to label: a .csv, .jsonl or .parquet file, a data set folder, or a data set name",
    )
    data.add_argument(
        "--text-column",
        type=given,
        metavar="NAME",
        help="column with the texts (default: the name that it had in training)",
    )
    data.add_argument(
        "--output",
        type=given,
        required=True,
        metavar="FILE",
        help="file to write, .csv, .jsonl or .parquet by its extension",
    )
    data.add_argument(
        "--output-column",
        type=given,
        default="prediction",
        metavar="NAME",
        help="name of the column with the labels",
    )
    data.add_argument("--overwrite", action="store_true", help="replace the output file if there is one")
    data.add_argument(
        "--model",
        type=given,
        metavar="NAME",
        help="the frozen model, if it is not where it was in training (default: the one trained with)",
    )
    add_table_options(data)
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument(
        "--score",
        action="store_true",
        help="choose the likeliest of the labels of the training for each row, with a probability of each, "
        "instead of letting the model write one; an ensemble always does",
    )
    scoring.add_argument(
        "--calibrate",
        action="store_true",
        help="with --score: take out what the model prefers even for texts that say nothing",
    )
    scoring.add_argument(
        "--length-normalise",
        action="store_true",
        help="with --score: compare labels by the mean over their tokens, not by the sum",
    )
    scoring.add_argument(
        "--label-column",
        type=given,
        metavar="NAME",
        help="with --score: column with the true labels, to measure accuracy and macro-F1 and to draw which "
        "label was taken for which (default: the one of the training, if the table has it)",
    )
    scoring.add_argument(
        "--combine",
        choices=("vote", "mean"),
        help="how the prompts of an ensemble decide: by majority, or by mean log-probability (default: vote)",
    )
    add_compute_options(parser)


def run(args: argparse.Namespace) -> int:
    """Check what was asked, label the rows, write the table."""
    adapter, output = Path(args.adapter), Path(args.output)
    folders = adapter_folders(adapter)
    if not folders:
        raise UsageError(f"--adapter {adapter} holds no adapter: give a folder that `softprompt train` wrote")
    if output.is_dir():
        raise UsageError(f"--output {output} is a folder: name a file")
    if output.exists() and not args.overwrite:
        raise UsageError(f"{output} exists already: name another --output or replace it with --overwrite")
    scored = args.score or folders != [adapter]
    if args.combine and len(folders) == 1:
        raise UsageError(
            f"--combine says how the prompts of an ensemble decide, but {adapter} holds one prompt: "
            "leave it out"
        )
    if not scored and (args.calibrate or args.length_normalise or args.label_column):
        raise UsageError("--calibrate, --length-normalise and --label-column need --score")
    check_adapters(folders)
    task, trained_model, _ = load_task(adapter)
    check_inputs(tables=[args.data], model=args.model or trained_model)
    require_extra()

    from rich.console import Console
    from rich.progress import Progress

    from softprompt.cli.models import (
        choose_device,
        choose_dtype,
        load_adapters,
        load_model,
        load_tokenizer,
        patch,
        quiet_libraries,
        set_threads,
    )
    from softprompt.cli.notes import length_notes, row_notes, say
    from softprompt.tasks.classification import Encoder
    from softprompt.tasks.inference import label_texts
    from softprompt.tasks.table import read_table
    from softprompt.tasks.written import check_writable, check_writable_type, write_frame

    quiet_libraries()
    check_writable_type(output)
    table = read_table(
        args.data,
        args.text_column or task.text_column,
        columns=task.columns,
        every_line=True,
        **table_arguments(args, [args.data]),
    )
    if args.output_column in table.frame.columns:
        raise UsageError(
            f"{args.data} has a column {args.output_column!r} already: name another --output-column"
        )
    if scored:
        from softprompt.cli.score import check_outputs

        check_outputs(args, task, table)
    check_writable(table.frame, output)
    device = choose_device(args.device)
    set_threads(args.threads, tiny=False)
    dtype = choose_dtype(bf16=args.bf16, fp16=args.fp16, device=device)
    model_name = check_model(args.model or trained_model)
    encoder = Encoder(task, load_tokenizer(model_name))
    model = load_adapters(load_model(model_name, dtype), model_name, folders).to(device)
    _check_length(args, model, task.max_length)
    model = patch(model, no_patch=args.no_patch)
    trained = f"the adapter was trained with --max-length {task.max_length}"
    say(row_notes([table]) + length_notes(encoder, [table], trained))
    if scored:
        from softprompt.cli.score import score_table

        return score_table(args, model, encoder, table, adapters=list(model.peft_config))

    start = time.perf_counter()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("labelling", total=len(table))
        labels = label_texts(
            model,
            encoder,
            table.rows,
            batch_size=args.batch_size,
            progress=lambda rows: progress.update(bar, advance=rows),
        )
    names = [task.name_of(label) for label in labels]
    write_frame(table.frame.assign(**{args.output_column: names}), output)
    foreign = sum(label not in task.labels for label in labels)
    print(f"{len(labels)} rows labelled in {time.perf_counter() - start:.1f} s: {output}")
    if foreign:
        known = ", ".join(map(task.name_of, task.labels))
        print(f"for {foreign} of them the model wrote something else than {known}")
    return 0


def _check_length(args: argparse.Namespace, model: Any, max_length: int) -> None:
    from softprompt.nesting import base_of

    positions = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)
    tokens = max(config.num_virtual_tokens for config in model.peft_config.values())
    if positions is not None and tokens + max_length > positions:
        raise UsageError(
            f"the {tokens} virtual tokens of {args.adapter} and its rows of up to {max_length} tokens exceed "
            f"the {positions} positions of the model: give the --model that it was trained with"
        )
