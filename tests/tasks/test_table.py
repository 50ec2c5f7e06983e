import json
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from softprompt.tasks import table as tables
from softprompt.tasks.errors import TaskError
from softprompt.tasks.table import (
    Table,
    check_labels_known,
    read_table,
    split_table,
    with_known_labels,
    with_words,
)
from softprompt.tasks.written import check_writable_type, write_frame

datasets = pytest.importorskip("datasets")

ROWS = {"text": ["NA", "two, with comma", "drei äöü"], "label": ["yes", "no", "yes"], "id": ["1", "2", "3"]}


@pytest.mark.parametrize(
    "suffix",
    [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".xlsx", ".csv.gz", ".tsv.xz", ".jsonl.bz2", ".json.zip"],
)
def test_what_is_written_is_read_back(tmp_path, suffix):
    path = tmp_path / f"table{suffix}"
    write_frame(pd.DataFrame(ROWS), path)
    table = read_table(path, "text", "label")
    assert table.texts == ROWS["text"]
    assert table.labels == ROWS["label"]
    assert table.frame["id"].tolist() == ROWS["id"]
    assert os.listdir(tmp_path) == [path.name]


def test_numbers_in_cells_become_their_digits(tmp_path):
    path = tmp_path / "table.jsonl"
    path.write_text('{"text": 12, "label": 0}\n{"text": "x", "label": 1, "note": null}\n')
    table = read_table(path, "text", "label")
    assert table.texts == ["12", "x"]
    assert table.labels == ["0", "1"]


FLOATS = {
    "JSON": (".jsonl", [1.0, 0.0, 1.0], ["1", "0", "1"], {"1": "1.0", "0": "0.0"}),
    "JSON, mixed": (".jsonl", [1.0, "1", 1], ["1", "1", "1"], {}),
    "JSON, both forms as text": (".jsonl", [1.0, "1.0", "0"], ["1", "1", "0"], {"1": "1.0"}),
    "JSON, halves": (".jsonl", [0.5, 1.0, -0.0], ["0.5", "1", "0"], {"1": "1.0", "0": "-0.0"}),
    "texts stay as they are": (".jsonl", ["1.0", "1", "01"], ["1.0", "1", "01"], {}),
    "truth is no number": (".jsonl", [True, 1.0, "yes"], ["True", "1", "yes"], {"1": "1.0"}),
    "Parquet": (".parquet", [1.0, 0.0, 2.5], ["1", "0", "2.5"], {"1": "1.0", "0": "0.0"}),
    "CSV": (".csv", [1.0, 0.0, 1.0], ["1.0", "0.0", "1.0"], {}),
    "a workbook": (".xlsx", [1.0, 0.0, "1"], ["1", "0", "1"], {}),
}


@pytest.mark.parametrize("suffix, cells, labels, names", FLOATS.values(), ids=FLOATS)
def test_whole_numbers_among_floats_are_labels_as_a_person_writes_them(
    tmp_path, suffix, cells, labels, names
):
    path = tmp_path / f"t{suffix}"
    column = pd.Series(cells, dtype=float if suffix == ".parquet" else object)
    write_frame(pd.DataFrame({"text": ["a", "b", "c"], "label": column}), path)
    table = read_table(path, "text", "label")
    assert (table.labels, table.label_names) == (labels, names)


def test_labels_are_known_in_any_form_of_their_numbers(tmp_path):
    write_frame(pd.DataFrame({"text": ["a", "b"], "label": [1.0, 0.0]}), tmp_path / "floats.parquet")
    write_frame(pd.DataFrame({"text": ["a", "b"], "label": [1, 0]}), tmp_path / "integers.csv")
    write_frame(pd.DataFrame({"text": ["a", "b"], "label": ["1.0", "0.0"]}), tmp_path / "texts.csv")
    floats, integers, texts = (
        read_table(tmp_path / name, "text", "label")
        for name in ("floats.parquet", "integers.csv", "texts.csv")
    )
    for other in (floats, integers, texts):
        assert with_known_labels(other, floats.known_labels(), floats.label_names).labels == ["1", "0"]
    assert with_known_labels(floats, texts.known_labels(), {}).labels == ["1.0", "0.0"]
    with pytest.raises(TaskError, match="it differs from '1' in case, spaces or number form alone"):
        with_known_labels(texts, integers.known_labels(), {})


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes("\ufefftext,label\na,b\n".encode())
    assert read_table(path, "text", "label").texts == ["a"]


def test_labels_lose_the_space_around_them_and_texts_keep_it(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('text,label\n" a ", yes \n')
    table = read_table(path, "text", "label")
    assert table.texts == [" a "]
    assert table.labels == ["yes"]


def test_a_saved_data_set_folder_gives_its_class_names(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no_x", "x"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data, "dev": data.select([1])}).save_to_disk(tmp_path / "parts")
    assert read_table(tmp_path / "plain", "text", "label").labels == ["x", "no x"]
    assert read_table(tmp_path / "parts", "text", "label", split="dev").labels == ["no x"]


BAD_FILES = {
    "unknown type": ("t.docx", b"x", "of the unknown type '.docx': give one of .csv, .tsv"),
    "empty file": ("t.csv", b"", "has no rows: give a table with at least one"),
    "header only": ("t.csv", b"text,label\n", "has no rows: give a table with at least one"),
    "missing text column": (
        "t.csv",
        b"Tweet,label\na,b\n",
        "no column 'text'; its columns are 'Tweet', 'label'",
    ),
    "missing label column": ("t.csv", b"text,Y\na,b\n", "has no column 'label'; its columns are 'text', 'Y'"),
    "empty text": (
        "t.csv",
        b"text,label\na,b\n ,b\n",
        "row 2 (counted from 1, without the header) has an empty text",
    ),
    "empty label": (
        "t.csv",
        b"text,label\na,\n",
        "row 1 (counted from 1, without the header) has an empty label",
    ),
    "null label": ("t.jsonl", b'{"text": "a", "label": null}', "row 1 (counted from 1, without the header)"),
    "ragged row": (
        "t.csv",
        b"text,label\na,b\na,b,c,d\n",
        "rows with more cells than its header has columns (line 3: 4, expected 2)",
    ),
    "one comma too many in every row": (
        "t.csv",
        b"text,label\nhello, you,b\nbye, you,c\n",
        "(line 2: 3, expected 2): put texts with commas into quotation marks",
    ),
    "a column twice": (
        "t.csv",
        b"text,label,text\na,b,c\n",
        "has several columns of the name 'text': rename all but one of them",
    ),
    "an object": (
        "t.jsonl",
        b'{"text": {"en": "a"}, "label": "b"}',
        "row 1 (counted from 1, without the header) has a dict in column 'text', expected a text",
    ),
    "several labels": (
        "t.jsonl",
        b'{"text": "a", "label": ["b", "c"]}',
        "row 1 (counted from 1, without the header) has a list in column 'label', expected a label",
    ),
    "half a surrogate pair": (
        "t.jsonl",
        b'{"text": "a \\ud83d", "label": "b"}',
        "row 1 (counted from 1, without the header) has a text in column 'text' that is no valid Unicode",
    ),
    "json without an end": ("t.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    "not utf-8": ("t.csv", b"text,label\n\xff\xfe,b\n", "is not a readable .csv table"),
    "broken json": ("t.jsonl", b'{"text": "a", "label": "b"}\n{"text"', "line 2 is not JSON"),
    "json list": ("t.jsonl", b"[1, 2]\n", "line 1 is not a JSON object: write one object a line"),
    "broken parquet": ("t.parquet", b"no", "is not a readable .parquet table"),
}


@pytest.mark.parametrize("name, content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_with_its_problem(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TaskError) as error:
        read_table(path, "text", "label")
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_rows_with_an_empty_text_or_label_are_skipped_where_that_is_asked(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,label,more\na,x,1\n ,y,2\nb,,3\n,,4\nc,y,5\n")
    with pytest.raises(TaskError, match=r"row 2 .* has an empty text .* or give --skip-empty"):
        read_table(path, "text", "label")
    (tmp_path / "labels.csv").write_text("text,label\na,\n")
    with pytest.raises(TaskError, match=r"row 1 .* has an empty label .* or give --skip-empty"):
        read_table(tmp_path / "labels.csv", "text", "label")
    table = read_table(path, "text", "label", columns=["more"], skip_empty=True)
    assert (table.texts, table.labels, table.others) == (["a", "c"], ["x", "y"], {"more": ["1", "5"]})
    assert table.notes == ("rows without a text and a label were skipped: 3",)
    assert (len(table), len(table.frame), table.index) == (2, 5, [0, 4])
    frame = table.frame_with({"self": ["p", "q"], "share": [0.5, 1.0]})
    assert frame["self"].dropna().to_dict() == {0: "p", 4: "q"}
    assert frame["share"].dropna().to_dict() == {0: 0.5, 4: 1.0}
    assert list(frame) == [*table.frame, "self", "share"]
    second = table.take([1])
    assert (second.texts, second.frame["more"].tolist(), second.index) == (["c"], ["5"], [0])
    unlabelled = read_table(path, "text", skip_empty=True)
    assert (unlabelled.texts, unlabelled.index) == (["a", "b", "c"], [0, 2, 4])
    path.write_text("text,label\n,x\na,\n")
    with pytest.raises(TaskError, match="has no row with a text and a label: is the text in column 'text'"):
        read_table(path, "text", "label", skip_empty=True)


def test_one_column_is_not_text_and_label(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\na,b\n")
    with pytest.raises(TaskError, match="column 'text' cannot be both the text and the label"):
        read_table(tmp_path / "t.csv", "text", "text")


def test_a_missing_file_is_refused():
    with pytest.raises(TaskError, match=r"nowhere\.csv does not exist: check the path"):
        read_table("nowhere.csv", "text")


def test_an_unknown_data_set_name_is_refused():
    with pytest.raises(TaskError, match="neither a table file nor a data set that can be loaded"):
        read_table("nobody/nothing", "text")


def test_an_unknown_split_is_refused_with_those_there_are(tmp_path):
    data = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"dev": data}).save_to_disk(tmp_path / "parts")
    with pytest.raises(TaskError, match="no split 'train': name one of 'dev'"):
        read_table(tmp_path / "parts", "text")


def test_a_table_of_an_unknown_type_is_not_written(tmp_path):
    with pytest.raises(TaskError, match=r"cannot write .*out\.txt: its type '\.txt' is not one of"):
        check_writable_type(tmp_path / "out.txt")


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    frame = pd.DataFrame({"a": [1, 2]})
    monkeypatch.setattr(Path, "write_bytes", lambda partial, content: (partial.write_text("half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        write_frame(frame, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def make(labels):
    frame = pd.DataFrame({"text": [f"t{i}" for i in range(len(labels))], "label": labels})
    return Table("made", "text", "label", frame["text"].tolist(), list(labels), frame)


def test_the_split_takes_its_share_of_every_label_and_loses_no_row():
    table = make(["a"] * 30 + ["b"] * 10 + ["c"])
    rest, taken = split_table(table, 0.2, seed=1)
    assert [taken.labels.count(label) for label in "abc"] == [6, 2, 0]
    assert [rest.labels.count(label) for label in "abc"] == [24, 8, 1]
    assert sorted(rest.texts + taken.texts) == sorted(table.texts)
    assert taken.frame["text"].tolist() == taken.texts


def test_the_split_depends_on_the_seed_alone():
    table = make(["a", "b"] * 50)
    first, again, other = (split_table(table, 0.3, seed)[1].texts for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_a_label_keeps_a_row_for_training_at_any_share():
    rest, taken = split_table(make(["a", "a", "b", "b"]), 0.99, seed=0)
    assert rest.known_labels() == taken.known_labels() == ("a", "b")


def test_too_few_rows_to_split_are_refused():
    with pytest.raises(TaskError, match=r"too few rows \(2\) to split off 0\.2 of them"):
        split_table(make(["a", "b"]), 0.2, seed=0)


def test_a_label_that_training_does_not_know_is_refused_with_its_row():
    with pytest.raises(
        TaskError, match=r"row 2 has the label 'maybe', which no training row has \(known: 'a', 'b'\)"
    ):
        check_labels_known(make(["a", "maybe"]), ("a", "b"))


def test_the_row_of_an_unknown_label_is_that_of_the_file_where_rows_were_skipped(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,label\n,a\nx,\ny,a\nz,maybe\n")
    with pytest.raises(TaskError, match="row 4 has the label 'maybe'"):
        check_labels_known(read_table(path, "text", "label", skip_empty=True), ("a",))


def test_words_are_learnt_in_the_place_of_labels_and_the_table_keeps_its_own():
    table = with_words(make(["0", "1", "2", "0"]), [("0", "not good"), ("1", "good")])
    assert table.labels == ["not good", "good", "2", "not good"]
    assert table.label_names == {"not good": "0", "good": "1"}
    assert with_words(table, []) == table
    floats = replace(make(["0", "1"]), label_names={"0": "0.0", "1": "1.0"})
    for zero in ("0", "0.0"):
        assert with_words(floats, [(zero, "no")]).label_names == {"no": "0.0", "1": "1.0"}


# label map, evaluation labels as read -> as training has them
EITHER_FORM = {
    "the labels of the table": ([("0", "no"), ("1", "yes")], ["0", "1"], ["no", "yes"]),
    "the words": ([("0", "no"), ("1", "yes")], ["no", "yes"], ["no", "yes"]),
    "both": ([("0", "no"), ("1", "yes")], ["no", "1", "yes", "0"], ["no", "yes", "yes", "no"]),
    "one label without words": ([("0", "no")], ["0", "1", "no"], ["no", "1", "no"]),
    "labels in another form of number": ([("0", "no"), ("1", "yes")], ["0.0", "1.0"], ["no", "yes"]),
    "a swap": ([("0", "1"), ("1", "0")], ["0", "1"], ["1", "0"]),
    "words that are the next label": ([("0", "1"), ("1", "2")], ["0", "1", "2"], ["1", "2", "2"]),
    "the same words": ([("0", "0"), ("1", "yes")], ["0", "1"], ["0", "yes"]),
}


@pytest.mark.parametrize("label_map, read, expected", EITHER_FORM.values(), ids=EITHER_FORM)
def test_a_table_to_measure_on_has_the_labels_or_the_words(label_map, read, expected):
    table = with_words(make(["0", "1"]), label_map)
    assert with_known_labels(make(read), table.known_labels(), table.label_names).labels == expected


def test_a_table_to_measure_on_may_have_integers_where_training_had_floats():
    floats = with_words(
        replace(make(["0", "1"]), label_names={"0": "0.0", "1": "1.0"}), [("0", "no"), ("1", "yes")]
    )
    for read in (["0", "1"], ["0.0", "1.0"]):
        assert with_known_labels(make(read), floats.known_labels(), floats.label_names).labels == [
            "no",
            "yes",
        ]
    with pytest.raises(TaskError, match=r"row 1 has the label '2', .*known: 'no', 'yes'"):
        with_known_labels(make(["2"]), floats.known_labels(), floats.label_names)


@pytest.mark.parametrize("other", ["floats", "integers"])
def test_words_that_are_other_numbers_are_not_taken_for_the_numbers_of_a_float_column(tmp_path, other):
    for name, kind in (("floats", float), ("integers", int)):
        frame = pd.DataFrame({"text": ["a", "b", "c"], "label": pd.Series([1, 2, 3], dtype=kind)})
        write_frame(frame, tmp_path / f"{name}.parquet")
    floats, measured = (
        read_table(tmp_path / f"{name}.parquet", "text", "label") for name in ("floats", other)
    )
    table = with_words(floats, [("1", "2"), ("2", "3"), ("3", "4")])
    assert table.labels == ["2", "3", "4"]
    assert with_known_labels(measured, table.known_labels(), table.label_names).labels == ["2", "3", "4"]


@pytest.mark.parametrize(
    "label_map, message",
    [
        ([("3", "a")], "--label-map 3=a: made has no such label; its labels are '0', '1', '2'"),
        ([("0", "1")], "--label-map 0=1: made has a label '1', and two labels would be one"),
        ([("0", "a"), ("1", "a")], "--label-map 1=a: another label has these words"),
        ([("0", "a"), ("0", "b")], "--label-map 0=b: the label has words already, 'a': give one"),
    ],
)
def test_words_that_would_lose_a_label_are_refused(label_map, message):
    with pytest.raises(TaskError, match=message):
        with_words(make(["0", "1", "2"]), label_map)


def test_json_lines_keep_a_line_separator_inside_a_text(tmp_path):
    path = tmp_path / "table.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert tables.read_table(path, "text").texts == ["a\u2028b"]
