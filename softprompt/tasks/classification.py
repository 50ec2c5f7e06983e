"""Text classification and text generation as language modelling: the template, its tokens and its targets.

A row becomes `prompt tokens + target tokens + end token`; only the target and the end token are learned. The
target is one of a few labels, or, for generation, a text of its own. This is the preprocessing of PEFT's
"prompt tuning for causal language modeling" guide for every row of the table.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from softprompt.tasks.errors import TaskError
from softprompt.tasks.folders import TASK_FILE
from softprompt.tasks.template import TEXT, Row, Template, from_before_columns, parse_template

DEFAULT_TEMPLATE = "{text_column} : {text} Label :"
IGNORED = -100
LENGTHS_AT_ONCE = 1000
CHOICES = {
    "padding": ("max_length", "longest"),
    "end_token": ("pad", "eos"),
    "positions": ("padded", "compact"),
}

Example = dict[str, list[int]]


@dataclass(frozen=True)
class TextTask:
    """What has to be known to turn a text into the input that an adapter was trained on.

    Attributes:
        text_column: name of the text column in the training table; fills `{text_column}` of the template.
        label_column: name of the label column in the training table.
        labels: those of the training rows, none for a generation task.
        template: the text of the input, with `{text}` once, and `{text_column}` and other columns at will;
            see `softprompt.tasks.template`.
        max_length: number of tokens of the longest row, prompt, label and end token together.
        padding: "max_length" pads every batch to `max_length`, "longest" to its own longest row.
        end_token: "pad" ends a label with the tokenizer's pad token, "eos" with its end-of-sequence token.
        label_prefix: what stands between the template and the label, a space as a rule; label and prefix are
            tokenized as they stand behind the template, and learned together. None: the label is tokenized by
            itself (adapters from before there was a prefix).
        positions: "padded": pads count for the positions that the prompt was trained with, as in PEFT;
            "compact": they do not, so a row is what it is alone.
        label_names: (label, name) of the labels that the training table calls otherwise.
        max_new_tokens: of a generation task, whose targets are texts of their own and not `labels`: the
            tokens of the longest target, end token included. None for a classification task.
    """

    text_column: str
    label_column: str
    labels: tuple[str, ...]
    template: str = DEFAULT_TEMPLATE
    max_length: int = 64
    padding: str = "max_length"
    end_token: str = "pad"
    label_prefix: str | None = None
    positions: str = "padded"
    label_names: tuple[tuple[str, str], ...] = ()
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check every field: an adapter of someone else brings them along."""
        for name in ("text_column", "label_column", "template"):
            if not isinstance(getattr(self, name), str):
                raise TaskError(f"{name} must be a text, got {getattr(self, name)!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise TaskError(
                    f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}"
                )
        if not isinstance(self.label_prefix, str | None):
            raise TaskError(f"label_prefix must be a text or null, got {self.label_prefix!r}")
        if not isinstance(self.max_length, int) or self.max_length < 1:
            raise TaskError(f"max_length must be a whole number of at least 1, got {self.max_length!r}")
        parse_template(self.template, self.text_column, self.label_column)
        if self.max_new_tokens is not None:
            if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
                raise TaskError(
                    f"max_new_tokens must be a whole number of at least 1, got {self.max_new_tokens!r}"
                )
            if self.labels:
                raise TaskError(f"a generation task has no labels, got {self.labels}")
        elif not self.labels:
            raise TaskError("a classification task needs at least one label")
        for label in self.labels:
            if not isinstance(label, str) or not label.strip():
                raise TaskError(f"a label must be a text that is not blank, got {label!r}")

    @property
    def generates(self) -> bool:
        """Whether every row has a target of its own."""
        return self.max_new_tokens is not None

    @property
    def target_word(self) -> str:
        """What a target is called in messages."""
        return "target" if self.generates else "label"

    @property
    def parts(self) -> Template:
        """The template, taken apart."""
        return parse_template(self.template, self.text_column, self.label_column)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns beside the text that the template reads."""
        return self.parts.columns

    def fill(self, row: Row) -> str:
        """Return the template with the row in it."""
        return self.parts.fill(row)

    def name_of(self, label: str) -> str:
        """Return what the training table calls a label."""
        return dict(self.label_names).get(label, label)

    def record(self) -> dict[str, Any]:
        """Return the fields as `softprompt.json` has them.

        What was not there before templates read columns, class names kept their underscores, labels had a
        prefix and texts could be generated, is there only where it says something: other tasks are written,
        and told apart, as they always were.
        """
        content = asdict(self)
        for name in ("label_prefix", "max_new_tokens"):
            if content[name] is None:
                del content[name]
        names = dict(content.pop("label_names"))
        if from_before_columns(self.template) != self.template:
            content["template_columns"] = list(self.columns)
        return content | ({"label_names": names} if names else {})

    def save(self, folder: Path, *, model: str, training: dict[str, Any]) -> None:
        """Write `softprompt.json`: this task, the base model and the settings of the training run."""
        content = {"model": model, **self.record(), "training": training}
        (folder / TASK_FILE).write_text(
            json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def load_task(folder: Path) -> tuple[TextTask, str, dict[str, Any]]:
    """Read `softprompt.json`: the task, the base model and the settings of the training run.

    Raises:
        TaskError: the file is missing or is not what `TextTask.save` wrote.
    """
    path = folder / TASK_FILE
    if not path.is_file():
        raise TaskError(f"{folder} has no {TASK_FILE}: give a folder that `softprompt train` wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model, training, labels = (content.pop(name) for name in ("model", "training", "labels"))
        for name, value, kind in (
            ("model", model, str),
            ("training", training, dict),
            ("labels", labels, list),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name} is {value!r}")
        if "bf16" in training:  # how the dtype was said before it had a name
            bf16, fp16 = training.pop("bf16"), training.pop("fp16", False)
            training["dtype"] = "bfloat16" if bf16 else "float16" if fp16 else "float32"
        if content.pop("template_columns", None) is None and isinstance(content.get("template"), str):
            content["template"] = from_before_columns(content["template"])
        names = tuple(content.pop("label_names", {}).items())
        task = TextTask(**content, labels=tuple(labels), label_names=names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TaskError(
            f"{path} is not a file that `softprompt train` wrote ({error}): train again"
        ) from error
    return task, model, training


class Encoder:
    """Turns texts and targets (labels, or the texts of a generation task) into token ids with one tokenizer.

    Where the tokenizer lacks the pad or the end-of-sequence token, the other one stands in for it. A text
    that is too long loses its end, never the template's and never the target: every prompt keeps room for
    the longest target, so that a text is cut in the same place in training and in prediction. Where the other
    columns of the template leave no room for the text, they lose their ends too, the last one first.

    Attributes:
        pad_token_id: fills batches.
        end_token_id: ends every target that is not cut.
        stop_token_ids: end a generated target.
        targets: the token ids of every label with its end token; none for generation.
        max_target: tokens of the longest target with its end token.
        max_prompt: tokens that the filled template may have.

    Raises:
        TaskError: the tokenizer has neither token, cannot tell two labels apart, or `max_length` has no room
            for the template, one text token and the longest target.
    """

    def __init__(self, task: TextTask, tokenizer: Any) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.pad_token_id = _first_set(tokenizer.pad_token_id, tokenizer.eos_token_id)
        eos_token_id = _first_set(tokenizer.eos_token_id, tokenizer.pad_token_id)
        self.end_token_id = eos_token_id if task.end_token == "eos" else self.pad_token_id
        self.stop_token_ids = sorted({self.end_token_id, eos_token_id})
        self.targets = {label: self._whole_target(label) for label in task.labels}
        self._label_of = {self._text(target): label for label, target in self.targets.items()}
        if len(self._label_of) < len(task.labels):
            raise TaskError(
                f"the tokenizer does not tell the labels {task.labels} apart: rename some of them"
            )
        self.max_target = task.max_new_tokens or max(map(len, self.targets.values()))
        self.max_prompt = task.max_length - self.max_target
        template_length = len(self._tokenize(self.filled_with("")))
        if template_length + 1 > self.max_prompt:
            raise TaskError(
                f"max_length {task.max_length} is too small: the template takes {template_length} tokens and "
                f"the longest {task.target_word} {self.max_target} with its end token, so it must be at "
                f"least {template_length + 1 + self.max_target}"
            )

    def prompt(self, row: Row) -> list[int]:
        """Return the token ids of the filled template, at most `max_prompt` of them."""
        input_ids = self._tokenize(row)
        if len(input_ids) <= self.max_prompt:
            return input_ids
        cells = {TEXT: row} if isinstance(row, str) else dict(row)
        for name in (TEXT, *reversed(self.task.columns)):
            whole = cells[name]
            if len(self._tokenize(cells | {name: ""})) > self.max_prompt:
                cells[name] = ""  # the next one has to lose something, too
                continue
            fits, too_long = 0, len(whole)
            while too_long - fits > 1:
                middle = (fits + too_long) // 2
                if len(self._tokenize(cells | {name: whole[:middle]})) <= self.max_prompt:
                    fits = middle
                else:
                    too_long = middle
            cells[name] = whole[:fits]
            break
        return self._tokenize(cells)

    def filled_with(self, text: str) -> Row:
        """Return a row that has the same text in each of its columns."""
        return dict.fromkeys((TEXT, *self.task.columns), text)

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """Return the tokens of each filled template: one with more than `max_prompt` is cut in `prompt`."""
        found: list[int] = []
        for start in range(0, len(rows), LENGTHS_AT_ONCE):
            texts = [self.task.fill(row) for row in rows[start : start + LENGTHS_AT_ONCE]]
            found += [len(self._without_end(ids)) for ids in self.tokenizer(texts)["input_ids"]]
        return found

    def target(self, text: str) -> list[int]:
        """Return the token ids that are learned behind a row.

        Those of a label and its end token; a target of a generation task has at most `max_target` of them,
        and none that ends it where it is cut.
        """
        if not self.task.generates:
            return self.targets[text]
        return self._whole_target(text)[: self.max_target]

    def answer(self, label: str) -> list[int]:
        """Return how a row with this label ends: the template behind its last column, label and end token."""
        return [*self._ids(self.task.parts.words[-1]), *self.targets[label]]

    def target_lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of targets with their end tokens: one with more than `max_target` is cut."""
        return [len(self._whole_target(text)) for text in texts]

    def example(self, row: Row, target_text: str) -> Example:
        """Return `input_ids`, `attention_mask` and `labels` of one row, all of its own length."""
        prompt, target = self.prompt(row), self.target(target_text)
        return {
            "input_ids": prompt + target,
            "attention_mask": [1] * (len(prompt) + len(target)),
            "labels": [IGNORED] * len(prompt) + target,
        }

    def examples(self, rows: Sequence[Row], target_texts: Sequence[str]) -> list[Example]:
        """Return `example` of every row."""
        return [self.example(row, text) for row, text in zip(rows, target_texts, strict=True)]

    def decode(self, generated: Sequence[int]) -> str:
        """Return the label that the generated ids spell, or their text where they spell none."""
        text = self._text(generated)
        return self._label_of.get(text, text)

    def _whole_target(self, text: str) -> list[int]:
        return [*self._target_ids(text), self.end_token_id]

    def _target_ids(self, target: str) -> list[int]:
        """The tokens of a target as it stands behind the template, unless both share a token."""
        ids, prefix, before = self._ids, self.task.label_prefix, self.task.parts.words[-1]
        if prefix is None:
            return ids(target)
        start, whole = ids(before), ids(before + prefix + target)
        return whole[len(start) :] if whole[: len(start)] == start else ids(prefix + target)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, token_ids: Sequence[int]) -> str:
        ids = list(itertools.takewhile(lambda token_id: token_id not in self.stop_token_ids, token_ids))
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _tokenize(self, row: Row) -> list[int]:
        return self._without_end(self.tokenizer(self.task.fill(row))["input_ids"])

    def _without_end(self, token_ids: Sequence[int]) -> list[int]:
        # Some tokenizers close every text with the end-of-sequence token; here the target comes next.
        ids = list(token_ids)
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids


def _first_set(*token_ids: int | None) -> int:
    for token_id in token_ids:
        if token_id is not None:
            return token_id
    raise TaskError("the tokenizer has neither a pad token nor an end-of-sequence token: give it one of them")
