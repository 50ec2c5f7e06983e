"""`--label-map`: other words for the labels of a table, which names its own in all that is written."""

import json

import pandas as pd
import pytest


@pytest.fixture
def rows():
    return [(f"w {i} {'good' if i % 2 else 'bad'}", i % 2) for i in range(12)]


@pytest.fixture
def train(run, model_folder, tmp_path):
    def call(data, *more, command="train"):
        names = ["--text-column", "text", "--label-column", "label", "--model", model_folder, "--epochs", 1]
        return run(command, "--data", data, *names, "--output", tmp_path / "out", *more)

    return call


@pytest.mark.parametrize("words", [("bad", "good"), ("1", "0")], ids=["words", "a swap"])
def test_words_are_learnt_and_the_labels_of_the_table_are_written(
    run, train, make_table, tmp_path, read_json, rows, words
):
    data = make_table(rows, header=("text", "label"))
    spoken = make_table([(text, words[label]) for text, label in rows], "words.csv", ("text", "label"))
    label_map = ["--label-map", f"0={words[0]}", f"1={words[1]}"]
    code, _, err = train(data, "--eval-share", 0, *label_map)
    assert (code, f"{words[0]!r} 6" in err) == (0, True)
    saved = read_json(tmp_path / "out" / "softprompt.json")
    assert saved["labels"] == sorted(words)
    assert saved["label_names"] == {words[0]: "0", words[1]: "1"}
    assert (
        run(
            "predict",
            "--adapter",
            tmp_path / "out",
            "--data",
            data,
            "--output",
            tmp_path / "p.csv",
            "--score",
        )[0]
        == 0
    )
    table = pd.read_csv(tmp_path / "p.csv", dtype=str)
    assert set(table["prediction"]) <= {"0", "1"}
    likelier = table["p(1)"].astype(float) > table["p(0)"].astype(float)
    assert (table["prediction"] == likelier.map({True: "1", False: "0"})).all()
    metrics = read_json(tmp_path / "p.metrics.json")
    assert sorted(metrics["labels"]) == ["0", "1"]
    assert metrics["accuracy"] == (table["prediction"] == table["label"]).mean()
    if words == ("1", "0"):
        return
    # The same rows with the words themselves give the same prompt, and are measured as these are.
    again = ["--adapter", tmp_path / "out", "--data", spoken, "--output", tmp_path / "q.csv"]
    assert run("predict", *again)[0] == 0
    assert read_json(tmp_path / "q.metrics.json")["confusion"] == metrics["confusion"]
    assert train(spoken, "--eval-share", 0, "--overwrite")[0] == 0
    assert read_json(tmp_path / "out" / "softprompt.json")["training"] == saved["training"]


def test_an_evaluation_table_has_the_labels_or_the_words(train, make_table, rows):
    data = make_table(rows, header=("text", "label"))
    mixed = make_table([("a", "0"), ("b", "good"), ("c", "1"), ("d", "bad")], "e.csv", ("text", "label"))
    code, _, err = train(data, "--eval-data", mixed, "--label-map", "0=bad", "1=good")
    assert code == 0
    assert "16 rows: 'bad' 8 (6 for training, 2 for evaluation), 'good' 8 (6 for" in err


def test_a_sweep_learns_the_words_too(train, make_table, rows, tmp_path):
    data = make_table(rows, header=("text", "label"))
    over = ["--over", "learning-rate", "0.1", "0.2", "--seeds", 1, "--label-map", "0=bad", "1=good"]
    code, _, err = train(data, *over, command="sweep")
    assert (code, "12 rows: 'bad' 6" in err) == (0, True)
    run_folder = next((tmp_path / "out" / "runs").iterdir())
    assert json.loads((run_folder / "softprompt.json").read_text())["label_names"] == {
        "bad": "0",
        "good": "1",
    }


def test_a_label_ends_at_the_first_equals_sign_and_may_begin_with_a_dash(
    train, make_table, tmp_path, read_json
):
    data = make_table([("a", "-1"), ("b", "x")] * 6, header=("text", "label"))
    assert train(data, "--label-map=-1=a=b", "--label-map", "x= more words ")[0] == 0
    names = read_json(tmp_path / "out" / "softprompt.json")["label_names"]
    assert names == {"a=b": "-1", "more words": "x"}


@pytest.mark.parametrize(
    "given, message",
    [
        (["0"], "expected LABEL=WORDS, got '0'"),
        (["0= "], "expected LABEL=WORDS, got '0= '"),
        (["=a"], "expected LABEL=WORDS, got '=a'"),
        (["2=a"], "--label-map 2=a: "),
        (["0=1"], "has a label '1', and two labels would be one"),
        (["0=a", "1=a"], "another label has these words"),
    ],
)
def test_a_map_that_does_not_fit_is_one_line(train, make_table, tmp_path, rows, given, message):
    code, out, err = train(make_table(rows, header=("text", "label")), "--label-map", *given)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "out").exists()
