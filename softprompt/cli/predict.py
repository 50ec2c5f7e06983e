"""`softprompt predict`: labels for new rows."""

import argparse
import time
from pathlib import Path

from softprompt.cli.errors import UsageError, require_extra
from softprompt.cli.options import Parser, add_command, add_compute_options, add_dataset_options
from softprompt.tasks.folders import ADAPTER_CONFIG


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
        "--adapter", required=True, metavar="FOLDER", help="folder that `softprompt train` wrote"
    )
    data.add_argument(
        "--data",
        required=True,
        metavar="TABLE",
        help="rows to label: a .csv, .jsonl or .parquet file, a data set folder, or a data set name",
    )
    data.add_argument(
        "--text-column",
        metavar="NAME",
        help="column with the texts (default: the name that it had in training)",
    )
    data.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="file to write, .csv, .jsonl or .parquet by its extension",
    )
    data.add_argument(
        "--output-column", default="prediction", metavar="NAME", help="name of the column with the labels"
    )
    data.add_argument("--overwrite", action="store_true", help="replace the output file if there is one")
    data.add_argument(
        "--model",
        metavar="NAME",
        help="the frozen model, if it is not where it was in training (default: the one trained with)",
    )
    add_dataset_options(data)
    add_compute_options(parser)


def run(args: argparse.Namespace) -> int:
    """Check what was asked, label the rows, write the table."""
    adapter, output = Path(args.adapter), Path(args.output)
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise UsageError(f"--adapter {adapter} holds no adapter: give a folder that `softprompt train` wrote")
    if output.exists() and not args.overwrite:
        raise UsageError(f"{output} exists already: name another --output or replace it with --overwrite")
    require_extra()

    from peft import PeftModel
    from rich.console import Console
    from rich.progress import Progress

    from softprompt.cli.models import (
        check_model,
        choose_device,
        choose_dtype,
        load_model,
        load_tokenizer,
        patch,
        quiet_libraries,
        set_threads,
    )
    from softprompt.tasks.classification import Encoder, load_task
    from softprompt.tasks.inference import label_texts
    from softprompt.tasks.table import check_writable_type, read_table, write_frame

    quiet_libraries()
    check_writable_type(output)
    task, trained_model, _ = load_task(adapter)
    table = read_table(
        args.data,
        args.text_column or task.text_column,
        subset=args.data_config,
        split=args.data_split,
    )
    if args.output_column in table.frame.columns:
        raise UsageError(
            f"{args.data} has a column {args.output_column!r} already: name another --output-column"
        )
    device = choose_device(args.device)
    set_threads(args.threads, tiny=False)
    dtype = choose_dtype(bf16=args.bf16, fp16=args.fp16, device=device)
    model_name = check_model(args.model or trained_model)
    encoder = Encoder(task, load_tokenizer(model_name))
    base = load_model(model_name, dtype)
    try:
        model = PeftModel.from_pretrained(base, str(adapter)).to(device)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"cannot load the adapter {adapter}: {error}") from error
    width, model_width = model.active_peft_config.token_dim, base.get_input_embeddings().weight.shape[1]
    if width != model_width:
        raise UsageError(
            f"the adapter {adapter} does not fit the model {model_name}: its virtual tokens are {width} "
            f"numbers wide, the model's tokens {model_width}; give the --model that it was trained with"
        )
    if not args.no_patch:
        model = patch(model)

    start = time.perf_counter()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("labelling", total=len(table))
        labels = label_texts(
            model,
            encoder,
            table.texts,
            batch_size=args.batch_size,
            progress=lambda rows: progress.update(bar, advance=rows),
        )
    write_frame(table.frame.assign(**{args.output_column: labels}), output)
    foreign = sum(label not in task.labels for label in labels)
    print(f"{len(labels)} rows labelled in {time.perf_counter() - start:.1f} s: {output}")
    if foreign:
        print(f"for {foreign} of them the model wrote something else than {', '.join(task.labels)}")
    return 0
