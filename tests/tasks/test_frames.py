"""Data sets of the `datasets` library: class names, splits, and folders that cannot be loaded."""

import pytest

from softprompt.tasks.errors import TaskError
from softprompt.tasks.table import read_table, with_known_labels

datasets = pytest.importorskip("datasets")


@pytest.fixture
def save(tmp_path):
    """Write a data set with the class names given, and read it as a table."""

    def make(names, numbers, folder="set", **more):
        features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        columns = {"text": [f"t{i}" for i in range(len(numbers))], "label": numbers}
        data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        data.save_to_disk(tmp_path / folder)
        return read_table(tmp_path / folder, "text", "label", **more)

    return make


def test_class_names_are_words_to_learn_and_names_in_the_frame(save):
    table = save(["no_x", "x", "not_at_all"], [1, 0, 2])
    assert table.labels == ["x", "no x", "not at all"]
    assert table.frame["label"].tolist() == ["x", "no_x", "not_at_all"]
    assert table.label_names == {"no x": "no_x", "not at all": "not_at_all"}
    assert table.take([1]).label_names == table.label_names


def test_class_names_that_would_be_the_same_words_stay_apart(save):
    table = save(["no_x", "no x"], [0, 1])
    assert table.labels == ["no_x", "no x"]
    assert table.label_names == {}


def test_a_row_without_a_class_has_no_label(save):
    with pytest.raises(TaskError, match=r"row 2 .* has an empty label"):
        save(["a", "b"], [0, -1])


def test_labels_are_known_by_the_words_and_by_the_names(save, tmp_path):
    table = save(["no_x", "x"], [1, 0])
    (tmp_path / "names.csv").write_text("text,label\na,no_x\nb,x\nc,no x\n")
    named = read_table(tmp_path / "names.csv", "text", "label")
    assert with_known_labels(named, table.known_labels(), table.label_names).labels == ["no x", "x", "no x"]
    # And the other way round: training had the names, and a data set follows.
    assert with_known_labels(table, ("no_x", "x"), {}).labels == ["x", "no_x"]
    with pytest.raises(TaskError, match="row 1 has the label 'x', which no training row has"):
        with_known_labels(table, ("no x", "y"), {})


def test_missing_integers_do_not_round_the_others(save, tmp_path):
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "id": [2**53 + 1, None]})
    data.save_to_disk(tmp_path / "ids")
    assert read_table(tmp_path / "ids", "text").frame["id"].tolist()[0] == 2**53 + 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"subset": "en"}, "without parts: leave --data-config out"),
        ({"split": "test"}, "leave --data-split out"),
    ],
)
def test_parts_that_a_saved_data_set_has_not_are_refused(save, options, message):
    with pytest.raises(TaskError, match=message):
        save(["a", "b"], [0, 1], **options)
    assert len(save(["a", "b"], [0, 1], "other", split="train")) == 2


def test_a_folder_with_a_loading_script_is_one_error_with_the_remedy(tmp_path):
    folder = tmp_path / "reviews"
    folder.mkdir()
    (folder / "reviews.py").write_text("raise SystemExit('this must not run')\n")
    with pytest.raises(TaskError) as error:
        read_table(folder, "text", "label")
    assert "loading script (reviews.py)" in str(error.value)
    assert "save its rows as a .csv, .jsonl or .parquet file" in str(error.value)


BROKEN = {
    "another encoding": ("a.csv", "text,label\ncafé,x\n".encode("latin-1"), "can't decode byte 0xe9"),
    "no Parquet": ("a.parquet", b"PAR1no", "smaller than the minimum file footer"),
    "half a JSON": ("a.jsonl", b'{"text": "a"', "neither a table file nor a data set"),
    "nothing": ("a.bin", b"", "neither a table file nor a data set"),
}


@pytest.mark.parametrize("name, content, message", BROKEN.values(), ids=BROKEN)
def test_a_folder_that_cannot_be_loaded_is_one_error_with_the_cause(tmp_path, name, content, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(TaskError, match=message):
        read_table(folder, "text", "label")
