"""What all prompts of a call share: the tables, the frozen model, its tokenizer and the task."""

import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softprompt import tiny
from softprompt.cli.checks import UsageError, check_model
from softprompt.cli.models import load_model, load_tokenizer, prepare
from softprompt.cli.resume import check_same_run, check_whole, fingerprint
from softprompt.cli.training_config import LONGEST, TrainingConfig
from softprompt.engine import plan_for
from softprompt.engine.runner import obstacle_to
from softprompt.prompts.vocabulary import scale_of
from softprompt.tasks.classification import Encoder, TextTask, load_task
from softprompt.tasks.errors import TaskError
from softprompt.tasks.labels import are_targets
from softprompt.tasks.table import (
    Table,
    balanced_rows,
    check_several_labels,
    read_table,
    split_table,
    with_known_labels,
    with_words,
)
from softprompt.tasks.template import parse_template

# Some chats begin with the date: a run must be the same, and can be resumed, on another day.
DAY_OF_CHATS = datetime.date(2024, 7, 26)
MANY_LABELS = 10  # of which some may be texts to be written, where most rows have one of their own


@dataclass(frozen=True, eq=False)
class Setup:
    """What all prompts of a call share.

    Attributes:
        config: the options, with numbers for what was left open.
        scale: of the model's embeddings.
        model_name: of the base model, a folder made absolute.
        base: the frozen model.
        device: "cpu" or "cuda".
        encoder: of the task, with the tokenizer.
        train_table: rows to train on.
        drawn_table: the same as they are drawn, see `--balance-labels`.
        eval_table: rows to measure on; None measures nothing.
        validation_table: rows that decide when to stop; None trains to the end.
        record: the model, and the settings of the run with a hash of its rows.
    """

    config: TrainingConfig
    scale: float
    model_name: str
    base: Any
    device: str
    encoder: Encoder
    train_table: Table
    drawn_table: Table
    eval_table: Table | None
    validation_table: Table | None
    record: dict[str, Any]


def read_tables(config: TrainingConfig) -> tuple[TrainingConfig, Table, Table | None]:
    """Return the training rows and the evaluation rows, None if nothing is to be measured.

    The configuration before them is that of their task.
    """
    columns = parse_template(config.template, config.text_column, config.label_column).columns
    train_source = config.data or str(tiny.train_table())
    eval_source = config.eval_data or (str(tiny.eval_table()) if config.data is None else None)
    sources = [source for source in (train_source, eval_source) if source is not None]
    reading = config.table.reading(sources)
    train_table, *others = [
        read_table(source, config.text_column, config.label_column, columns=columns, **reading)
        for source in sources
    ]
    train_table = with_words(train_table, config.label_map or [])
    for_labels = config.label_map or config.balance_labels
    config = config.for_task(config.task or ("classify" if for_labels else _task_of(train_table)))
    labelled = config.task == "classify"
    if labelled:
        check_several_labels(train_table)
    if others and labelled:
        others = [with_known_labels(others[0], train_table.known_labels(), train_table.label_names)]
    if others:
        return config, train_table, others[0]
    if config.eval_share == 0:
        return config, train_table, None
    return config, *split_table(train_table, config.eval_share, config.seed, by_label=labelled)


def _task_of(table: Table) -> str:
    rows, different = len(table), len(table.known_labels())
    said = f"softprompt: {rows:,} rows with {different:,} different"
    if are_targets(table.labels or []):
        print(
            f"{said} targets in column {table.label_column!r}: trained as a generation task "
            "(--task generate); give --task classify if they are labels",
            file=sys.stderr,
        )
        return "generate"
    if different >= MANY_LABELS and different > rows / 2:
        print(
            f"{said} labels in column {table.label_column!r}: give --task generate if they are texts to be "
            "written",
            file=sys.stderr,
        )
    return "classify"


def set_up(
    config: TrainingConfig,
    train_table: Table,
    eval_table: Table | None,
    *,
    checkpoint: Path | None = None,
) -> Setup:
    """Load the model and its tokenizer, and describe the task.

    Raises:
        UsageError: they do not go together, or not with the run that `checkpoint` is from.
    """
    model_name = check_model(config.model or tiny.model_path())
    saved = None
    if checkpoint is not None:
        check_whole(checkpoint)
        saved = load_task(checkpoint)
    trained = None if saved is None else saved[2].get("dtype")
    device, dtype = prepare(config.compute, tiny=config.model is None, trained=trained)
    base, tokenizer = load_model(model_name, dtype), load_tokenizer(model_name)
    scale = scale_of(base)
    config = config.resolved(rows=len(train_table), scale=scale, dtype=str(dtype).removeprefix("torch."))
    if config.patience is not None and not config.validation_share:
        raise UsageError("--patience needs rows to watch: give --validation-share")
    train_table, validation_table = _split_validation(config, train_table)
    template, label_prefix = template_of(config, tokenizer)
    generates = config.task == "generate"
    task = TextTask(
        text_column=config.text_column,
        label_column=config.label_column,
        labels=() if generates else train_table.known_labels(),
        template=template,
        label_prefix=label_prefix,
        max_length=config.max_length or LONGEST,
        padding=config.padding,
        end_token=config.end_token or "eos",
        positions=choose_positions(config, base),
        label_names=() if generates else tuple(train_table.label_names.items()),
        max_new_tokens=(config.max_new_tokens or LONGEST) if generates else None,
    )
    tables = [table for table in (train_table, eval_table, validation_table) if table is not None]
    task = _with_lengths(config, task, tokenizer, tables)
    encoder = Encoder(task, tokenizer)
    drawn_table = balanced_rows(train_table) if config.balance_labels else train_table
    training = {**config.settings, "rows": fingerprint(drawn_table)}
    if saved is not None:
        check_same_run(saved, (task, model_name, training))
    record = {"model": model_name, "training": training}
    return Setup(
        config=config,
        scale=scale,
        model_name=model_name,
        base=base,
        device=device,
        encoder=encoder,
        train_table=train_table,
        drawn_table=drawn_table,
        eval_table=eval_table,
        validation_table=validation_table,
        record=record,
    )


def _with_lengths(
    config: TrainingConfig, task: TextTask, tokenizer: Any, tables: Sequence[Table]
) -> TextTask:
    """Return the task with the lengths that were left open; the training rows are the first table."""
    encoder = Encoder(replace(task, max_length=sys.maxsize), tokenizer)
    longest_target = encoder.max_target
    if task.generates and config.max_new_tokens is None:
        longest_target = min(LONGEST, max(encoder.target_lengths(tables[0].labels or [])))
        task = replace(task, max_new_tokens=longest_target)
    if config.max_length is None:
        longest = max(length for table in tables for length in encoder.lengths(table.rows)) + longest_target
        # A long target takes no room from the text.
        most = LONGEST + longest_target if task.generates else LONGEST
        task = replace(task, max_length=min(longest, most))
    return task


def template_of(config: TrainingConfig, tokenizer: Any) -> tuple[str, str | None]:
    """Return the template, and what stands between it and a label; None for labels tokenized by themselves.

    A space before a label belongs to the label, as in running text, where tokenizers join both. In a chat the
    label is the answer to the template, and begins it.
    """
    if config.chat_template:
        return _in_chat(config.template.strip(" "), tokenizer), config.label_prefix or ""
    if config.label_prefix is not None:
        return config.template, config.label_prefix or None
    template = config.template.rstrip(" ")
    return template, "" if template[-1:].isspace() else " "


def _in_chat(template: str, tokenizer: Any) -> str:
    """The chat of a tokenizer, with a template as the message of the user, up to where the answer begins."""
    place = "SOFTPROMPT-MESSAGE"
    if not tokenizer.chat_template:
        raise UsageError("--chat-template: the model's tokenizer has no chat template: leave it out")
    try:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": place}],
            chat_template=_without_clock(tokenizer.get_chat_template()),
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as error:  # the template is a program of the model's, with errors of its own
        raise UsageError(
            f"--chat-template: the model's chat template takes no message of a user alone ({error}): write "
            "the chat as --template"
        ) from error
    if chat.count(place) != 1:
        raise UsageError(
            "--chat-template: the model's chat template does not put a message into the chat once: write "
            "the chat as --template"
        )
    bos = tokenizer.bos_token
    if bos and chat.startswith(bos) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        chat = chat.removeprefix(bos)  # the tokenizer puts one before every text
    before, after = (part.replace("{", "{{").replace("}", "}}") for part in chat.split(place))
    return f"{before}{template}{after}"


def _without_clock(chat_template: str) -> str:
    """Return a chat template in which `strftime_now`, which transformers gives it, tells `DAY_OF_CHATS`."""
    if "strftime_now" not in chat_template:
        return chat_template
    marks = [f"%{mark}" for mark in "aAbBdeHIjmMpSyY"]
    said = "".join(f".replace('{mark}', '{DAY_OF_CHATS.strftime(mark)}')" for mark in marks)
    # What is written behind the macro keeps a new line at the start of the template.
    return f"{{% macro strftime_now(form) %}}{{{{ form{said} }}}}{{% endmacro %}}{{{{ '' }}}}{chat_template}"


def choose_positions(config: TrainingConfig, base: Any) -> str:
    """Return what `--positions` asks for; without it "compact" where softprompt can run it."""
    if config.compute.no_patch and config.positions == "compact":
        raise UsageError("--positions compact needs softprompt's path: leave --no-patch out")
    if config.compute.no_patch or config.positions == "padded":
        return "padded"
    plan = plan_for(base)
    if obstacle_to(plan, compact=True) is None:
        return "compact"
    if config.positions == "compact":
        raise UsageError(f"--positions compact cannot be had for this model: {plan.reason}")
    print(f"softprompt: pads count for positions (--positions padded): {plan.reason}", file=sys.stderr)
    return "padded"


def _split_validation(config: TrainingConfig, table: Table) -> tuple[Table, Table | None]:
    if not config.validation_share:
        return table, None
    try:
        by_label = config.task != "generate"
        return split_table(table, config.validation_share, config.seed, by_label=by_label)
    except TaskError:
        raise UsageError(
            f"--validation-share {config.validation_share:g}: {table.source} has too few rows ({len(table)} "
            "for training) to keep any of them out: give a larger share or a larger table"
        ) from None
