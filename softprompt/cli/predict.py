"""`softprompt predict`: labels or texts for new rows."""

import time
from pathlib import Path
from typing import Any

from softprompt.cli.checks import (
    UsageError,
    check_inputs,
    check_model,
    check_new,
    check_output_file,
    require_extra,
    usage_errors,
)
from softprompt.cli.options import Command, option_name
from softprompt.cli.predict_config import PredictConfig
from softprompt.prompt_paths import check_adapter_folder
from softprompt.tasks.classification import load_task
from softprompt.tasks.folders import adapter_folders

COMMAND = Command(
    PredictConfig,
    summary="label new rows, or write texts for them, with a trained soft prompt",
    description="Label the rows of a table with an adapter that `softprompt train` wrote, or write what one "
    "of --task generate has learned to write. The output has the columns of the table and one more with "
    "the labels or the texts.",
    example="softprompt predict --adapter complaints --data new_tweets.csv --output labelled.csv",
)


def run(config: PredictConfig) -> int:
    """Check what was asked, label the rows or write their texts, write the table."""
    adapter, output = Path(config.adapter), Path(config.output)
    folders = adapter_folders(adapter)
    if not folders:
        raise UsageError(f"--adapter {adapter} holds no adapter: give a folder that `softprompt train` wrote")
    check_new(check_output_file(config.output), overwrite=config.overwrite)
    if config.generate and folders != [adapter]:
        raise UsageError("--generate lets one prompt write, and an ensemble decides by scores: leave it out")
    if config.combine and len(folders) == 1:
        raise UsageError(
            f"--combine says how the prompts of an ensemble decide, but {adapter} holds one prompt: "
            "leave it out"
        )
    if config.generate and (
        config.score or config.calibrate or config.length_normalise or config.label_column
    ):
        raise UsageError(
            "--score, --calibrate, --length-normalise and --label-column are for labels that are chosen by "
            "their likelihood: leave --generate out"
        )
    with usage_errors():
        for folder in folders:
            check_adapter_folder(folder)
    task, trained_model, training = load_task(adapter)
    if task.generates:
        _check_generation(config, folders)
    elif config.max_new_tokens is not None:
        raise UsageError(
            f"--max-new-tokens is for prompts of --task generate, and {adapter} labels: leave it out"
        )
    check_inputs(config.data, model=config.model or trained_model)
    require_extra()

    from softprompt.cli import score
    from softprompt.cli.models import (
        load_adapters,
        load_model,
        load_tokenizer,
        patch,
        prepare,
        quiet_libraries,
    )
    from softprompt.cli.notes import length_notes, row_notes, say
    from softprompt.cli.progress import progress_bar
    from softprompt.nesting import base_of
    from softprompt.tasks.classification import Encoder
    from softprompt.tasks.inference import label_texts, packs_texts
    from softprompt.tasks.table import read_table
    from softprompt.tasks.written import check_writable, check_writable_type, write_frame

    quiet_libraries()
    check_writable_type(output)
    table = read_table(
        config.data,
        config.text_column or task.text_column,
        columns=task.columns,
        every_line=True,
        **config.table.reading([config.data]),
    )
    if config.output_column in table.frame.columns:
        raise UsageError(
            f"{config.data} has a column {config.output_column!r} already: name another --output-column"
        )
    if task.generates or not config.generate:
        score.check_outputs(config, task, table)
    check_writable(table.frame, output)
    device, dtype = prepare(config.compute, trained=training.get("dtype", "float32"))
    model_name = check_model(config.model or trained_model)
    encoder = Encoder(task, load_tokenizer(model_name))
    if config.max_new_tokens is not None:  # texts are cut where training cuts them, whatever may be written
        encoder.max_target = config.max_new_tokens
    model = load_adapters(load_model(model_name, dtype), model_name, folders).to(device)
    _check_length(adapter, model, encoder.max_prompt + encoder.max_target)
    writes = config.generate or task.generates
    positions = task.positions if writes and packs_texts(base_of(model)) else "padded"
    model = patch(model, positions=positions, no_patch=config.compute.no_patch)
    trained = f"the adapter was trained with --max-length {task.max_length}"
    say(row_notes([table]) + length_notes(encoder, [table], trained))
    if not config.generate and not task.generates:
        score.score_table(config, model, encoder, table)
        return 0
    start = time.perf_counter()
    with progress_bar("writing" if task.generates else "labelling", len(table)) as advance:
        labels = label_texts(
            model, encoder, table.rows, batch_size=config.compute.batch_size, progress=advance
        )
    names = [task.name_of(label) for label in labels]
    write_frame(table.frame_with({config.output_column: names}), output)
    seconds = time.perf_counter() - start
    if task.generates:
        print(f"{len(labels)} texts written in {seconds:.1f} s: {output}")
        score.measure_texts(config, task, table, labels)
        return 0
    if config.overwrite:
        score.remove_measured(config, task)
    foreign = sum(label not in task.labels for label in labels)
    print(f"{len(labels)} rows labelled in {seconds:.1f} s: {output}")
    if foreign:
        known = ", ".join(map(task.name_of, task.labels))
        print(f"for {foreign} of them the model wrote something else than {known}")
    return 0


def _check_generation(config: PredictConfig, folders: list[Path]) -> None:
    if len(folders) > 1:
        raise UsageError(
            f"--adapter {config.adapter} holds {len(folders)} prompts that write texts, which cannot be "
            f"combined: name one of them, {folders[0]} to {folders[-1].name}"
        )
    for name in ("score", "calibrate", "length_normalise"):
        if getattr(config, name):
            raise UsageError(
                f"{option_name(name)} is for labels, and {config.adapter} writes texts: leave it out"
            )


def _check_length(adapter: Path, model: Any, max_length: int) -> None:
    from softprompt.nesting import base_of

    positions = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)
    tokens = max(config.num_virtual_tokens for config in model.peft_config.values())
    if positions is not None and tokens + max_length > positions:
        raise UsageError(
            f"the {tokens} virtual tokens of {adapter} and its rows of up to {max_length} tokens exceed "
            f"the {positions} positions of the model: give the --model that it was trained with"
        )
