"""What the commands say of the rows that they were given: counts, and what may not be as it was meant."""

import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from softprompt.cli.inputs import Setup
from softprompt.cli.training_config import FEWEST_STEPS
from softprompt.prompts.init import label_word_ids
from softprompt.tasks.classification import IGNORED, Encoder
from softprompt.tasks.labels import evaluation_notes, label_counts, look_alikes
from softprompt.tasks.table import Table


def say_rows(setup: Setup) -> None:
    """Print how many rows each label has, or how long targets are, and the notes on the tables of a run."""
    encoder, train_table = setup.encoder, setup.train_table
    kept = {"evaluation": setup.eval_table, "validation": setup.validation_table}
    used = {use: table for use, table in kept.items() if table is not None}
    tables = [train_table, *used.values()]
    labels = [label for table in tables for label in table.labels or []]
    if encoder.task.generates:
        counts = [f"{len(table):,} for {use}" for use, table in {"training": train_table, **used}.items()]
        lines = [f"{len(labels):,} rows with targets: {', '.join(counts)}", *target_notes(encoder, labels)]
    else:
        others = {f"for {use}": table.labels or [] for use, table in used.items()}
        lines = [f"{len(labels):,} rows: {label_counts(train_table.labels or [], others)}"]
        lines += look_alikes(labels)
    for use, table in used.items():
        lines += evaluation_notes(encoder.task.labels, table.labels or [], use)
    lines += row_notes(tables)
    lines += length_notes(encoder, tables, "a larger --max-length keeps it")
    say(lines)


def say_training(setup: Setup) -> None:
    """Print what a model sees of a row, where the prompt starts, and how it is trained."""
    config, encoder = setup.config, setup.encoder
    rows, batch_size = len(setup.drawn_table), config.compute.batch_size
    steps = config.steps or (config.epochs or 1) * math.ceil(rows / batch_size)
    example = encoder.example(setup.train_table.rows[0], (setup.train_table.labels or [""])[0])
    label = sum(target != IGNORED for target in example["labels"])
    before, behind = (
        encoder.tokenizer.decode(ids)
        for ids in (example["input_ids"][:-label], example["input_ids"][-label:])
    )
    lines = [
        f"the first row as the model sees it: {config.num_virtual_tokens} virtual tokens, {before!r}, and to "
        f"be learned {behind!r}",
        f"{_start_note(setup)}; learning rate {config.learning_rate:g}, which is "
        f"{(config.learning_rate or 0) / setup.scale:.2g} of the scale of the model's embeddings "
        f"({setup.scale:.3g}, their root mean square)",
        f"{steps:,} steps of {batch_size} rows: {steps * batch_size / rows:.2g} passes over {rows:,} rows",
    ]
    if config.balance_labels:
        lines.append(
            f"rows of rarer labels are drawn again: a pass has {rows:,} rows, made of "
            f"{len(setup.train_table):,}"
        )
    if steps < FEWEST_STEPS:
        lines.append(f"{steps} steps are few for a soft prompt: give more --epochs or --steps")
    say(lines)


def _start_note(setup: Setup) -> str:
    config, count = setup.config, setup.config.num_virtual_tokens
    if config.start == "counted" and setup.encoder.task.generates:
        return "the prompt starts at tokens of the training texts (--init counted)"
    if config.start == "answers":
        answers = [setup.encoder.answer(label) for label in setup.encoder.task.labels]
        ids, what, kept = [token for answer in answers for token in answer], "answers", slice(-count, None)
    elif config.start == "label-words":
        ids = label_word_ids(setup.encoder.tokenizer, setup.encoder.task.labels)
        what, kept = "words of the labels", slice(count)
    else:
        return f"the prompt starts at --init {config.start}"
    start = f"the prompt starts at the {what}, {setup.encoder.tokenizer.decode(ids[kept])!r}"
    if len(ids) > count:
        return f"{start}, {count} of their {len(ids)} tokens (a larger --num-virtual-tokens keeps them)"
    return f"{start}, repeated to {count} tokens"


def loss_note(loss: float, vocabulary: int) -> str | None:
    """Return what is to be said of a first loss, in nats per token, that guessing would be below."""
    if not loss > math.log(vocabulary):
        return None
    return (
        f"the first loss, {loss:.1f} nats per token, is above that of guessing among all {vocabulary:,} "
        f"tokens ({math.log(vocabulary):.1f}): template, --label-prefix or --end-token may not be what the "
        "model knows"
    )


def result_notes(metrics: dict[str, Any]) -> list[str]:
    """Return what is to be said of the scores of a trained prompt."""
    accuracy, rows = metrics["eval_exact_match"], metrics["eval_rows"]
    if accuracy is None:
        return []
    if "eval_rouge_l" in metrics:
        before = metrics["zero_shot"]
        if metrics["eval_rouge_l"] > before["rouge_l"]:
            return []
        return [
            f"what is written is no nearer to the targets (ROUGE-L {metrics['eval_rouge_l']:.3f}) than "
            f"without a prompt ({before['rouge_l']:.3f}): more --steps, more rows, another --template or a "
            "larger model may help"
        ]
    notes, base, trained = [], metrics["majority"], metrics["train_exact_match"]
    # Two standard errors of a share of so many rows.
    error = 2 * math.sqrt(max(accuracy * (1 - accuracy), 0.25 / rows) / rows)
    if len(metrics["eval_predicted"]) == 1 and rows > 1:
        (label,) = metrics["eval_predicted"]
        notes.append(f"all {rows:,} evaluation rows got the label {label!r}: the prompt tells nothing apart")
    elif accuracy <= base["exact_match"] + (error if rows < 100 else 0):
        notes.append(
            f"the accuracy of {accuracy:.1%} on {rows:,} rows is not clearly above that of always answering "
            f"{base['label']!r}, {base['exact_match']:.1%}: more --steps, more rows, another --template or a "
            "larger model may help"
        )
    if trained is not None and trained - accuracy > max(0.1, error):
        notes.append(
            f"{trained:.1%} of training rows and {accuracy:.1%} of evaluation rows are right: the prompt has "
            "learned its rows by heart; more rows, fewer --steps or --num-virtual-tokens, or --ensemble may "
            "help"
        )
    return notes


def row_notes(tables: Sequence[Table]) -> list[str]:
    """Return what is to be said of the sources, and of cells without content."""
    notes = list(dict.fromkeys(f"{table.source}: {note}" for table in tables for note in table.notes))
    empty: Counter[str] = Counter()
    for table in tables:
        for name, cells in table.others.items():
            empty[name] += sum(not cell.strip() for cell in cells)
    return notes + [
        f"rows with nothing in column {name!r}, which the template reads: {count:,}"
        for name, count in empty.items()
        if count
    ]


def length_notes(encoder: Encoder, tables: Sequence[Table], advice: str) -> list[str]:
    """Return how many rows do not fit, so that something of them is not seen."""
    lengths = [length for table in tables for length in encoder.lengths(table.rows)]
    cut = sum(length > encoder.max_prompt for length in lengths)
    if not cut:
        return []
    longest = max(lengths) + encoder.max_target
    return [
        f"{cut:,} of {len(lengths):,} rows are longer than the {encoder.task.max_length} tokens of "
        f"--max-length and lose the end of their text (the longest has {longest:,} with its "
        f"{encoder.task.target_word}): {advice}"
    ]


def target_notes(encoder: Encoder, targets: Sequence[str]) -> list[str]:
    """Return how long the targets of a generation task are, and how many are cut."""
    lengths, room = encoder.target_lengths(targets), encoder.max_target
    notes = [
        f"targets have {statistics.median(lengths):g} tokens in the middle and {max(lengths):,} at most, "
        f"the end token included; the prompt is trained to write up to {room:,} (--max-new-tokens)"
    ]
    cut = sum(length > room for length in lengths)
    if cut:
        notes.append(
            f"{cut:,} of {len(lengths):,} targets are longer than the {room:,} tokens of --max-new-tokens "
            "and lose their end, with the end token: a larger one keeps them"
        )
    return notes


def say(lines: Sequence[str]) -> None:
    """Print notes beside the results of a command."""
    for line in lines:
        print(f"softprompt: {' '.join(line.split())}", file=sys.stderr)
