import pytest

from softprompt.tasks.labels import (
    clean_label,
    evaluation_notes,
    label_counts,
    label_words,
    look_alikes,
    look_of,
    whole_number,
)


@pytest.mark.parametrize(
    "cell", ["yes", " yes\t", "\u200byes", "yes \ufeff", "\u200b \u2060yes\u200d \u200b", "\u00a0yes\n"]
)
def test_spaces_and_marks_without_width_around_a_label_are_no_part_of_it(cell):
    assert clean_label(cell) == "yes"


def test_a_joiner_inside_a_label_is_part_of_it():
    family = "\U0001f468\u200d\U0001f469"
    assert clean_label(family) == family


@pytest.mark.parametrize(
    "one, other",
    [("Yes", "yes"), ("1", "1.0"), ("01", "1"), ("no  x", "no x"), ("no\u00a0x", "no x"), ("n\u200bo", "no")],
)
def test_labels_that_look_alike_are_named_with_their_rows(one, other):
    assert look_of(one) == look_of(other)
    (note,) = look_alikes([one, "else", other, one])
    assert f"{one!r} (2 rows)" in note
    assert f"{other!r} (1 row)" in note
    assert "else" not in note


@pytest.mark.parametrize("labels", [["1", "2"], ["yes", "no"], ["1", "1.5"], ["a", "ä"], ["no_x", "no x"]])
def test_labels_that_differ_are_not(labels):
    assert look_alikes(labels) == []


def test_class_names_are_words_unless_two_would_be_the_same():
    assert label_words(["no_x", "x"]) == {"no_x": "no x", "x": "x"}
    assert label_words(["no_x", "no x"]) == {"no_x": "no_x", "no x": "no x"}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1.0", "1"),
        ("-2.00", "-2"),
        ("-0.0", "0"),
        ("1.", "1"),
        ("0.5", "0.5"),
        ("1", "1"),
        ("1e+16", "1e+16"),
        ("1.0.0", "1.0.0"),
        ("a.0", "a.0"),
        ("inf", "inf"),
        (".0", ".0"),
    ],
)
def test_a_whole_number_is_written_without_its_point(text, expected):
    assert whole_number(text) == expected


def test_the_rows_of_each_label_are_counted_by_their_use():
    assert label_counts(["b", "a", "b"], {}) == "'b' 2, 'a' 1"
    counted = label_counts(["b", "a", "b"], {"for evaluation": ["a", "a"]})
    assert counted == "'a' 3 (1 for training, 2 for evaluation), 'b' 2 (2 for training, 0 for evaluation)"
    many = label_counts([str(i) for i in range(1000, 1077)], {})
    assert many.endswith("'1019' 1, and 57 rarer labels")


def test_labels_without_a_row_to_measure_on_and_a_single_row_are_said():
    assert evaluation_notes(("a", "b"), ["a", "b"], "evaluation") == []
    lacking, single = evaluation_notes(("a", "b"), ["a"], "evaluation")
    assert lacking == "no evaluation row has the label 'b', so nothing is measured of it"
    assert single.startswith("there is 1 evaluation row only")
