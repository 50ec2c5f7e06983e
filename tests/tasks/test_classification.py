import json
import re
from dataclasses import replace

import pytest

from softprompt.tasks.classification import IGNORED, Encoder, TextTask, load_task
from softprompt.tasks.collate import LeftPadCollator
from softprompt.tasks.errors import TaskError

TASK = TextTask("Tweet text", "Label", ("complaint", "no complaint"))
PAD = 3


def meant_by_the_article(tokenizer, texts, labels, max_length):
    """The preprocessing of PEFT's guide with every statement run for every row."""
    model_inputs = tokenizer([f"Tweet text : {text} Label : " for text in texts])
    targets = tokenizer(labels)
    rows = []
    for prompt, target in zip(model_inputs["input_ids"], targets["input_ids"], strict=True):
        target = [*target, tokenizer.pad_token_id]
        missing = max_length - len(prompt) - len(target)
        rows.append(
            {
                "input_ids": [tokenizer.pad_token_id] * missing + prompt + target,
                "attention_mask": [0] * missing + [1] * (len(prompt) + len(target)),
                "labels": [-100] * (missing + len(prompt)) + target,
            }
        )
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_batches_are_those_that_the_article_means(tokenizer):
    texts, labels = ["a b c", "d", "e f g h i j"], ["complaint", "no complaint", "complaint"]
    encoder = Encoder(replace(TASK, max_length=20), tokenizer)
    batch = LeftPadCollator(encoder.pad_token_id, 20)(encoder.examples(texts, labels))
    expected = meant_by_the_article(tokenizer, texts, labels, 20)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected


def test_a_row_is_the_filled_template_then_the_label_then_the_pad_token(tokenizer, ids):
    example = Encoder(TASK, tokenizer).example("a b", "no complaint")
    assert example["input_ids"] == ids("Tweet text : a b Label : no complaint <pad>")
    assert example["labels"] == [IGNORED] * 7 + ids("no complaint <pad>")
    assert example["attention_mask"] == [1] * 10


@pytest.mark.parametrize("end_token, end", [("pad", "<pad>"), ("eos", "</s>")])
def test_a_label_ends_with_the_token_of_choice(tokenizer, ids, end_token, end):
    encoder = Encoder(replace(TASK, end_token=end_token), tokenizer)
    assert encoder.example("a", "complaint")["labels"][-2:] == ids(f"complaint {end}")
    assert encoder.pad_token_id == PAD


def test_without_a_pad_token_the_end_of_sequence_token_ends_a_label(make_tokenizer, ids):
    encoder = Encoder(TASK, make_tokenizer(eos_token="</s>"))
    assert encoder.example("a", "complaint")["input_ids"][-2:] == ids("complaint </s>")
    assert encoder.pad_token_id == encoder.end_token_id == ids("</s>")[0]


@pytest.mark.parametrize("words", range(1, 11))
def test_a_long_text_loses_its_end_and_never_the_template_or_the_label(tokenizer, ids, words):
    encoder = Encoder(replace(TASK, max_length=12), tokenizer)
    text = " ".join("abcdefghij"[:words])
    for label in TASK.labels:
        kept = " ".join(text.split()[: min(words, 4)])
        example = encoder.example(text, label)
        assert example["input_ids"] == ids(f"Tweet text : {kept} Label : {label} <pad>")
        assert len(example["input_ids"]) <= 12


def test_max_length_needs_room_for_the_template_a_token_and_the_longest_label(tokenizer):
    Encoder(replace(TASK, max_length=9), tokenizer)
    with pytest.raises(TaskError, match=r"takes 5 tokens and the longest label 3 .* must be at least 9"):
        Encoder(replace(TASK, max_length=8), tokenizer)


def test_a_closing_end_of_sequence_token_does_not_part_prompt_and_label(tokenizer, ids):
    class Closing:
        pad_token_id, eos_token_id, decode = PAD, tokenizer.eos_token_id, tokenizer.decode

        def __call__(self, text, add_special_tokens=True):
            end = [self.eos_token_id] if add_special_tokens else []
            return {"input_ids": tokenizer(text)["input_ids"] + end}

    assert Encoder(TASK, Closing()).prompt("a") == ids("Tweet text : a Label :")


@pytest.mark.parametrize(
    "generated, label",
    [
        ("complaint <pad> a b", "complaint"),
        ("no complaint", "no complaint"),
        ("no <pad> complaint", "no"),
        ("complaint </s> a <pad>", "complaint"),
        ("a b <pad>", "a b"),
        ("<pad>", ""),
    ],
)
def test_generated_ids_spell_a_label_up_to_the_end_token(tokenizer, ids, generated, label):
    assert Encoder(TASK, tokenizer).decode(ids(generated)) == label


def test_labels_that_the_tokenizer_cannot_tell_apart_are_refused(tokenizer):
    with pytest.raises(TaskError, match="does not tell the labels"):
        Encoder(replace(TASK, labels=("yes", "oui")), tokenizer)


def test_a_tokenizer_without_pad_and_end_token_is_refused(make_tokenizer):
    with pytest.raises(TaskError, match="neither a pad token nor an end-of-sequence token"):
        Encoder(TASK, make_tokenizer())


@pytest.mark.parametrize("template", ["no place", "{text} {text}"])
def test_a_template_must_have_the_text_once(template):
    with pytest.raises(TaskError, match=r"must contain \{text\} exactly once"):
        replace(TASK, template=template)


def test_braces_in_a_text_are_left_alone():
    assert TASK.fill("{text_column} {x}") == "Tweet text : {text_column} {x} Label :"


def test_a_saved_task_is_read_back(tmp_path):
    task = replace(TASK, template="{text} => ", max_length=30, padding="longest")
    task.save(tmp_path, model="some/model", training={"seed": 3})
    assert load_task(tmp_path) == (task, "some/model", {"seed": 3})
    saved = json.loads((tmp_path / "softprompt.json").read_text())
    assert saved["labels"] == ["complaint", "no complaint"]
    assert saved["template"] == "{text} => "


PAIRS = replace(
    TASK, template="{text} : {other} Label :", max_length=10
)  # 3 words, and 3 of the longest label


@pytest.mark.parametrize(
    "text, other, kept",
    [
        ("a b", "c d", "a b : c d Label :"),
        ("a b c d", "e f", "a b : e f Label :"),
        ("a b", "c d e f g h", ": c d e f Label :"),
    ],
)
def test_a_row_that_is_too_long_loses_the_end_of_its_text_before_that_of_other_columns(
    tokenizer, ids, text, other, kept
):
    encoder = Encoder(PAIRS, tokenizer)
    row = {"text": text, "other": other}
    assert encoder.prompt(row) == ids(kept)
    assert encoder.lengths([row, {"text": "a", "other": ""}]) == [len(f"{text} {other}".split()) + 3, 4]


def test_other_columns_lose_their_ends_from_the_last_to_the_first(tokenizer, ids):
    encoder = Encoder(replace(PAIRS, template="{text} {first} : {second}", max_length=7), tokenizer)
    row = {"text": "a b", "first": "c d e f g", "second": "h i"}
    assert encoder.prompt(row) == ids("c d e :")


def test_a_task_with_columns_is_read_back_and_an_older_one_keeps_its_meaning(tmp_path):
    task = replace(TASK, template="{other} {{x}} {text}", label_names=(("no complaint", "no_complaint"),))
    task.save(tmp_path, model="some/model", training={})
    assert load_task(tmp_path)[0] == task
    saved = json.loads((tmp_path / "softprompt.json").read_text())
    assert saved["template_columns"] == ["other"]
    assert saved["label_names"] == {"no complaint": "no_complaint"}
    saved["template"] = "{other} {{x}} {text}\\n{label}"
    del saved["template_columns"], saved["label_names"]  # as it was written before
    (tmp_path / "softprompt.json").write_text(json.dumps(saved))
    older = load_task(tmp_path)[0]
    assert older.fill("a") == "{other} {{x}} a\\n{label}"
    assert older.columns == ()
    older.save(tmp_path, model="some/model", training={})
    assert load_task(tmp_path)[0] == older


def test_a_task_without_columns_is_written_as_before(tmp_path):
    assert "label_names" not in TASK.record()
    assert "template_columns" not in TASK.record()
    assert list(TASK.record()) == [
        "text_column", "label_column", "labels", "template", "max_length", "padding", "end_token", "positions"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"model": "m"}', '{"model": "m", "training": {}, "labels": 1}']
)
def test_a_folder_without_a_usable_task_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "softprompt.json").write_text(content)
    with pytest.raises(TaskError, match="`softprompt train` wrote"):
        load_task(tmp_path)


def test_a_label_is_tokenized_as_it_stands_behind_the_template(tokenizer):
    known = {"text_column": "Tweet text", "label_column": "Label", "labels": ("complaint", "no complaint")}
    task = TextTask(**known, label_prefix=" ", end_token="eos")
    targets = Encoder(task, tokenizer).targets
    assert targets["no complaint"] == [*tokenizer(" no complaint")["input_ids"], tokenizer.eos_token_id]
    alone = Encoder(TextTask(**known), tokenizer).targets
    assert alone["complaint"] == [*tokenizer("complaint")["input_ids"], tokenizer.pad_token_id]


class JoiningTokenizer:
    """Tokens are words; a word behind no space is another token, and "up:" joins what follows it."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self):
        self.numbers = {}

    def __call__(self, text, add_special_tokens=True):
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        pieces = re.findall(r"up:\S*|\s?\S+|\s", text)
        return {"input_ids": [self.numbers.setdefault(piece, len(self.numbers) + 2) for piece in pieces]}

    def decode(self, ids, **_):
        words = {number: piece for piece, number in self.numbers.items()}
        return "".join(words[number] for number in ids)


@pytest.mark.parametrize(
    "template, prefix, pieces",
    [
        ("{text} Label:", " ", [" yes"]),
        ("{text}\nLabel:\n", "", ["yes"]),
        ("{text} up:", "", ["yes"]),  # it would be one token with the template's last one
        ("{text}", " ", [" yes"]),
    ],
)
def test_no_token_of_a_label_is_one_of_the_template(template, prefix, pieces):
    task = TextTask("t", "l", ("yes", "no"), template, label_prefix=prefix)
    encoder = Encoder(task, tokenizer := JoiningTokenizer())
    words = {number: piece for piece, number in tokenizer.numbers.items()}
    assert [words[number] for number in encoder.targets["yes"][:-1]] == pieces
    assert encoder.decode(encoder.targets["yes"]) == "yes"


def test_only_a_prefix_is_recorded_and_it_must_be_a_text():
    task = TextTask("t", "l", ("a", "b"))
    assert "label_prefix" not in task.record()
    assert replace(task, label_prefix="").record()["label_prefix"] == ""
    with pytest.raises(TaskError, match="label_prefix must be a text or null, got 3"):
        replace(task, label_prefix=3)
