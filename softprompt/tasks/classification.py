"""Text classification as language modelling: the template, its tokens and its targets.

A row becomes `prompt tokens + label tokens + end token`; only the label and the end token are targets. This
is the preprocessing of PEFT's "prompt tuning for causal language modeling" guide for every row of the table.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from softprompt.tasks.errors import TaskError
from softprompt.tasks.folders import TASK_FILE

DEFAULT_TEMPLATE = "{text_column} : {text} Label : "
IGNORED = -100
CHOICES = {
    "padding": ("max_length", "longest"),
    "end_token": ("pad", "eos"),
    "positions": ("padded", "compact"),
}

Example = dict[str, list[int]]


@dataclass(frozen=True)
class ClassificationTask:
    """What has to be known to turn a text into the input that an adapter was trained on.

    Attributes:
        text_column: name of the text column in the training table; fills `{text_column}` of the template.
        label_column: name of the label column in the training table.
        labels: the labels of the training rows.
        template: the text of the input, with `{text}` once and `{text_column}` at will.
        max_length: number of tokens of the longest row, prompt, label and end token together.
        padding: "max_length" pads every batch to `max_length`, "longest" to its own longest row.
        end_token: "pad" ends a label with the tokenizer's pad token, "eos" with its end-of-sequence token.
        positions: "padded": pads count for the positions that the prompt was trained with, as in PEFT;
            "compact": they do not, so a row is what it is alone.
    """

    text_column: str
    label_column: str
    labels: tuple[str, ...]
    template: str = DEFAULT_TEMPLATE
    max_length: int = 64
    padding: str = "max_length"
    end_token: str = "pad"
    positions: str = "padded"

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
        if not isinstance(self.max_length, int) or self.max_length < 1:
            raise TaskError(f"max_length must be a whole number of at least 1, got {self.max_length!r}")
        if self.template.count("{text}") != 1:
            raise TaskError(f"the template {self.template!r} must contain {{text}} exactly once")
        if not self.labels:
            raise TaskError("a classification task needs at least one label")
        for label in self.labels:
            if not isinstance(label, str) or not label.strip():
                raise TaskError(f"a label must be a text that is not blank, got {label!r}")

    def fill(self, text: str) -> str:
        """Return the template with the text in it."""
        before, after = (
            part.replace("{text_column}", self.text_column) for part in self.template.split("{text}")
        )
        return before + text + after

    def save(self, folder: Path, *, model: str, training: dict[str, Any]) -> None:
        """Write `softprompt.json`: this task, the base model and the settings of the training run."""
        content = {"model": model, **asdict(self), "training": training}
        (folder / TASK_FILE).write_text(
            json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def load_task(folder: Path) -> tuple[ClassificationTask, str, dict[str, Any]]:
    """Read `softprompt.json`: the task, the base model and the settings of the training run.

    Raises:
        TaskError: the file is missing or is not what `ClassificationTask.save` wrote.
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
        task = ClassificationTask(**content, labels=tuple(labels))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TaskError(
            f"{path} is not a file that `softprompt train` wrote ({error}): train again"
        ) from error
    return task, model, training


class Encoder:
    """Turns texts and labels into token ids with one tokenizer.

    Where the tokenizer lacks the pad or the end-of-sequence token, the other one stands in for it. A text
    that is too long loses its end, never the template's and never the label: every prompt keeps room for the
    longest label, so that a text is cut in the same place in training and in labelling.

    Attributes:
        pad_token_id: fills batches.
        end_token_id: ends every label.
        stop_token_ids: end a generated label.
        max_target: tokens of the longest label with its end token.
        max_prompt: tokens that the filled template may have.

    Raises:
        TaskError: the tokenizer has neither token, cannot tell two labels apart, or `max_length` has no room
            for the template, one text token and the longest label.
    """

    def __init__(self, task: ClassificationTask, tokenizer: Any) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.pad_token_id = _first_set(tokenizer.pad_token_id, tokenizer.eos_token_id)
        eos_token_id = _first_set(tokenizer.eos_token_id, tokenizer.pad_token_id)
        self.end_token_id = eos_token_id if task.end_token == "eos" else self.pad_token_id
        self.stop_token_ids = sorted({self.end_token_id, eos_token_id})
        self.targets = {
            label: [*tokenizer(label, add_special_tokens=False)["input_ids"], self.end_token_id]
            for label in task.labels
        }
        self._label_of = {self._text(target): label for label, target in self.targets.items()}
        if len(self._label_of) < len(task.labels):
            raise TaskError(
                f"the tokenizer does not tell the labels {task.labels} apart: rename some of them"
            )
        self.max_target = max(len(target) for target in self.targets.values())
        self.max_prompt = task.max_length - self.max_target
        template_length = len(self._tokenize(""))
        if template_length + 1 > self.max_prompt:
            raise TaskError(
                f"max_length {task.max_length} is too small: the template takes {template_length} tokens and "
                f"the longest label {self.max_target} with its end token, so it must be at least "
                f"{template_length + 1 + self.max_target}"
            )

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of the filled template, at most `max_prompt` of them."""
        input_ids = self._tokenize(text)
        if len(input_ids) <= self.max_prompt:
            return input_ids
        fits, too_long = 0, len(text)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if len(self._tokenize(text[:middle])) <= self.max_prompt:
                fits = middle
            else:
                too_long = middle
        return self._tokenize(text[:fits])

    def example(self, text: str, label: str) -> Example:
        """Return `input_ids`, `attention_mask` and `labels` of one row, all of its own length."""
        prompt, target = self.prompt(text), self.targets[label]
        return {
            "input_ids": prompt + target,
            "attention_mask": [1] * (len(prompt) + len(target)),
            "labels": [IGNORED] * len(prompt) + target,
        }

    def examples(self, texts: Sequence[str], labels: Sequence[str]) -> list[Example]:
        """Return `example` of every row."""
        return [self.example(text, label) for text, label in zip(texts, labels, strict=True)]

    def decode(self, generated: Sequence[int]) -> str:
        """Return the label that the generated ids spell, or their text where they spell none."""
        text = self._text(generated)
        return self._label_of.get(text, text)

    def _text(self, token_ids: Sequence[int]) -> str:
        ids = list(itertools.takewhile(lambda token_id: token_id not in self.stop_token_ids, token_ids))
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _tokenize(self, text: str) -> list[int]:
        input_ids: list[int] = list(self.tokenizer(self.task.fill(text))["input_ids"])
        # Some tokenizers close every text with the end-of-sequence token; here the label comes next.
        if input_ids and input_ids[-1] == self.tokenizer.eos_token_id:
            input_ids.pop()
        return input_ids


def _first_set(*token_ids: int | None) -> int:
    for token_id in token_ids:
        if token_id is not None:
            return token_id
    raise TaskError("the tokenizer has neither a pad token nor an end-of-sequence token: give it one of them")
