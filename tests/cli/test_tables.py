"""What the commands make of tables: rows and cells come back as they were, and nothing is lost in silence."""

import json
from pathlib import Path

import pandas as pd
import pytest

datasets = pytest.importorskip("datasets")

PAIRS = [("a b", "c", "yes"), ("d", "e f", "no"), ("g", "h", "yes"), ("i j", "k", "no")] * 3


@pytest.fixture(scope="module")
def adapters(model_folder, tmp_path_factory):
    """One adapter of a template with two columns, and an ensemble of it, hardly trained."""
    from softprompt.cli import main

    folder = tmp_path_factory.mktemp("pairs")
    frame = pd.DataFrame(PAIRS, columns=["premise", "hypothesis", "label"])
    frame.to_csv(folder / "pairs.csv", index=False)
    for name, more in (("one", []), ("several", ["--ensemble", "2", "--init", "random"])):
        arguments = ["train", "--data", folder / "pairs.csv", "--model", model_folder, "--epochs", 1]
        arguments += ["--text-column", "premise", "--label-column", "label", "--output", folder / name]
        arguments += ["--template", r"{premise}\n{hypothesis} =>", "--init", "vocab", *more]
        assert main([str(argument) for argument in arguments]) == 0
    return folder


@pytest.fixture
def predict(run, adapters, tmp_path):
    def call(data, *more, adapter="one", output="out.csv"):
        place = ["--adapter", adapters / adapter, "--data", data, "--output", tmp_path / output]
        return run("predict", "--overwrite", *place, *more)

    return call


@pytest.fixture
def train(run, model_folder, tmp_path):
    def call(data, *more, columns=("text", "label")):
        names = ["--text-column", columns[0], "--label-column", columns[1], "--epochs", 1]
        return run(
            "train", "--data", data, "--model", model_folder, *names, "--output", tmp_path / "out", *more
        )

    return call


def prompts_seen(monkeypatch):
    """The texts that the tokenizer of the task sees, from here on."""
    from softprompt.tasks.classification import TextTask

    seen, fill = [], TextTask.fill

    def record(self, row):
        seen.append(fill(self, row))
        return seen[-1]

    monkeypatch.setattr(TextTask, "fill", record)
    return seen


def test_a_template_stores_its_columns_and_a_typed_line_break(adapters, read_json):
    saved = read_json(adapters / "one" / "softprompt.json")
    assert saved["template"] == "{premise}\n{hypothesis} =>"
    assert saved["template_columns"] == ["hypothesis"]


@pytest.mark.parametrize("adapter, more", [("one", ()), ("one", ("--score", "--calibrate")), ("several", ())])
def test_every_column_of_the_template_is_filled_from_the_row(predict, make_table, monkeypatch, adapter, more):
    seen = prompts_seen(monkeypatch)
    data = make_table([("x y", "z"), ("u", "v w")], header=("premise", "hypothesis"))
    code, _, err = predict(data, *more, adapter=adapter)
    assert (code, err) == (0, "")
    assert {"x y\nz =>", "u\nv w =>"} <= set(seen)
    assert ("N/A\nN/A =>" in seen) == ("--calibrate" in more)
    assert not [text for text in seen if "{" in text]


def test_the_text_column_may_have_another_name_than_in_the_template(predict, make_table, monkeypatch):
    seen = prompts_seen(monkeypatch)
    data = make_table([("x y", "z")], header=("sentence", "hypothesis"))
    assert predict(data, "--text-column", "sentence")[0] == 0
    assert "x y\nz =>" in seen


@pytest.mark.parametrize("more", [(), ("--score",)])
def test_a_table_without_a_column_of_the_template_is_one_line(predict, make_table, tmp_path, more):
    code, out, err = predict(make_table([("x", "y")], header=("premise", "label")), *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "has no column 'hypothesis'" in err
    assert "but the template reads {hypothesis}" in err
    assert not (tmp_path / "out.csv").exists()


def test_training_and_sweeps_see_every_column_of_the_template(
    run, train, model_folder, adapters, tmp_path, monkeypatch
):
    seen = prompts_seen(monkeypatch)
    template = ["--template", "{{{hypothesis}}} after {text}:"]
    assert train(adapters / "pairs.csv", *template, columns=("premise", "label"))[0] == 0
    wanted = {f"{{{hypothesis}}} after {premise}:" for premise, hypothesis, _ in PAIRS}
    assert wanted <= set(seen)
    seen.clear()
    names = ["--text-column", "premise", "--label-column", "label", "--model", model_folder, "--epochs", 1]
    over = ["--over", "learning-rate", "0.1", "0.2", "--seeds", 1, "--output", tmp_path / "sweep"]
    assert run("sweep", "--data", adapters / "pairs.csv", *names, *over, *template)[0] == 0
    assert wanted <= set(seen)
    assert not [text for text in seen if "{text}" in text or "{hypothesis}" in text]


@pytest.mark.parametrize(
    "template, message",
    [
        ("{text} {sentiment}", "has no column 'sentiment'; its columns are 'premise', 'hypothesis', 'label'"),
        ("{text} {label}", "has {label}, the column of the labels: leave it out"),
        ("{text} { }", "but the template reads { }"),
        ("{text} {", "without the name of a column: write {{ or }}"),
    ],
)
def test_a_template_that_cannot_be_filled_is_one_line(train, adapters, tmp_path, template, message):
    code, out, err = train(adapters / "pairs.csv", "--template", template, columns=("premise", "label"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "out").exists()


def test_label_in_braces_without_such_a_column_says_where_the_label_goes(train, make_table):
    data = make_table([("a", "x"), ("b", "y")])
    _, _, err = train(data, "--template", "{text} {label}", columns=("Tweet text", "Label"))
    assert "leave it out, the label is written behind the template" in err


def test_an_export_of_one_text_says_that_the_template_reads_more(run, adapters, tmp_path):
    place = ["--adapter", adapters / "one", "--output", tmp_path / "request.json"]
    code, _, err = run("export", "--format", "vllm", "--text", "a", *place)
    assert code == 2
    assert "reads 'hypothesis' beside the text, and --text is one text" in err


def test_an_adapter_from_before_columns_labels_with_its_braces(
    predict, adapters, make_table, monkeypatch, read_json
):
    path = adapters / "several" / "softprompt.json"
    saved = read_json(path)
    older = {name: value for name, value in saved.items() if name != "template_columns"}
    path.write_text(
        json.dumps({**older, "template": "{text}\\n{hypothesis} {x}", "max_length": 64}), encoding="utf-8"
    )
    seen = prompts_seen(monkeypatch)
    try:
        assert predict(make_table([("x",)], header=("premise",)), adapter="several")[0] == 0
    finally:
        path.write_text(json.dumps(saved), encoding="utf-8")
    assert "x\\n{hypothesis} {x}" in seen


@pytest.mark.parametrize("more", [(), ("--score",)])
def test_blank_lines_between_rows_to_label_are_one_line(predict, tmp_path, more):
    (tmp_path / "t.csv").write_text("premise,hypothesis\na,b\n\n\nc,d\n\n")
    code, out, err = predict(tmp_path / "t.csv", *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "has empty lines between its rows (line 3, 4)" in err
    (tmp_path / "t.csv").write_text("premise,hypothesis\na,b\nc,d\n\n")
    assert predict(tmp_path / "t.csv", *more)[0] == 0
    assert pd.read_csv(tmp_path / "out.csv")["premise"].tolist() == ["a", "c"]


def test_blank_lines_between_rows_to_learn_are_left_out_and_said(train, tmp_path):
    (tmp_path / "t.csv").write_text("text,label\n" + "a,x\n\nb,y\n" * 5)
    code, _, err = train(tmp_path / "t.csv")
    assert code == 0
    assert "t.csv: blank lines between rows were left out: 5\n" in err


def test_indices_times_and_small_numbers_of_a_parquet_table_come_back(predict, tmp_path):
    index = pd.Index(["T-1", "T-2"], name="ticket")
    times = pd.to_datetime(["2024-01-01 10:11:12.345678", None])
    columns = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "x": [2.5e-13, 1 / 3], "when": times}
    columns["steps"] = [list(range(2000)), None]
    pd.DataFrame(columns, index=index).to_parquet(tmp_path / "t.parquet")
    for output in ("out.jsonl", "out.csv"):
        assert predict(tmp_path / "t.parquet", output=output)[0] == 0
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (first["ticket"], first["x"], first["when"]) == ("T-1", 2.5e-13, "2024-01-01T10:11:12.345678")
    assert (second["x"], second["when"], second["steps"]) == (1 / 3, None, None)
    table = pd.read_csv(tmp_path / "out.csv")
    assert table["ticket"].tolist() == ["T-1", "T-2"]
    assert json.loads(table["steps"][0]) == list(range(2000))


def test_a_table_that_the_output_cannot_hold_is_one_line_before_the_model_is_loaded(predict, tmp_path):
    rows = [{"premise": "a", "hypothesis": "b", "n": 1}, {"premise": "a", "hypothesis": "b", "n": "one"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = predict(tmp_path / "t.jsonl", "--model", "nobody/nothing", output="out.parquet")
    assert code == 2
    assert "a .parquet file needs one type in each column" in err
    assert err.count("\n") == 1


def test_the_names_of_classes_come_back_with_their_underscores(run, train, tmp_path, read_json):
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no_fault", "a_fault"])}
    rows = {"text": [f"w {i}" for i in range(12)], "label": [0, 1] * 6}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "set")
    assert train(tmp_path / "set", "--learning-rate", 0.3)[0] == 0
    assert read_json(tmp_path / "out" / "softprompt.json")["labels"] == ["a fault", "no fault"]
    place = ["--adapter", tmp_path / "out", "--data", tmp_path / "set", "--output", tmp_path / "p.csv"]
    assert run("predict", "--score", *place)[0] == 0
    table = pd.read_csv(tmp_path / "p.csv")
    assert table["label"].tolist() == ["no_fault", "a_fault"] * 6
    assert set(table["prediction"]) <= {"no_fault", "a_fault"}
    assert {"p(no_fault)", "p(a_fault)"} <= set(table.columns)
    metrics = read_json(tmp_path / "p.metrics.json")
    assert metrics["labels"] == ["a_fault", "no_fault"]
    assert metrics["accuracy"] == (table["prediction"] == table["label"]).mean()
    # The table that was written has the names, and is measured as the data set was.
    again = ["--adapter", tmp_path / "out", "--data", tmp_path / "p2.csv", "--output", tmp_path / "q.csv"]
    table[["text", "label"]].to_csv(tmp_path / "p2.csv", index=False)
    assert run("predict", "--score", *again)[0] == 0
    assert read_json(tmp_path / "q.metrics.json")["confusion"] == metrics["confusion"]


def test_the_rows_of_each_label_and_doubtful_labels_are_printed(train, make_table):
    rows = [(f"a {i}", label) for i in range(5) for label in ("Yes", "yes ", "\u200bno", "no", "1", "1.0")]
    code, _, err = train(make_table([*rows, ("b", "rare")]), columns=("Tweet text", "Label"))
    assert code == 0
    assert (
        "31 rows: 'no' 10 (8 for training, 2 for evaluation), '1' 5 (4 for training, 1 for evaluation)" in err
    )
    assert "the labels 'Yes' (5 rows), 'yes' (5 rows) differ in case" in err
    assert "the labels '1' (5 rows), '1.0' (5 rows) differ in" in err
    assert "no evaluation row has the label 'rare'" in err
    assert err.count("the labels '") == 2


def test_an_evaluation_of_one_row_is_said(train, make_table):
    rows = [("a", "x"), ("b", "x"), ("c", "x"), ("d", "y")]
    _, _, err = train(make_table(rows), "--eval-share", 0.3, columns=("Tweet text", "Label"))
    assert "there is 1 evaluation row only" in err
    assert "no evaluation row has the label 'y'" in err


def test_a_single_label_is_one_line(run, train, make_table, model_folder, tmp_path):
    data = make_table([("a", "x"), ("b", " x"), ("c", "x\u200b")])
    code, _, err = train(data, columns=("Tweet text", "Label"))
    assert (code, err.count("\n")) == (2, 1)
    assert "has the label 'x' in all 3 rows" in err
    over = ["--over", "learning-rate", "0.1", "0.2", "--output", tmp_path / "sweep"]
    code, _, err = run("sweep", "--data", data, "--model", model_folder, *over)
    assert code == 2
    assert "has the label 'x' in all 3 rows" in err


def test_rows_that_are_cut_are_counted(train, run, make_table, tmp_path):
    rows = [("my order never came " * (i % 3 * 9 + 1), label) for i in range(9) for label in ("x", "y")]
    data = make_table(rows)
    code, _, err = train(data, "--max-length", 40, columns=("Tweet text", "Label"))
    assert code == 0
    assert "12 of 18 rows are longer than the 40 tokens of --max-length and lose the end of their text" in err
    assert "a larger --max-length keeps it" in err
    place = ["--adapter", tmp_path / "out", "--data", data, "--output", tmp_path / "p.csv"]
    code, _, err = run("predict", *place)
    assert code == 0
    assert "12 of 18 rows are longer than the 40 tokens" in err
    assert "the adapter was trained with --max-length 40" in err


@pytest.mark.parametrize(
    "option, message",
    [
        (("--data-split", "train"), "--data-split is for data sets, and"),
        (("--data-config", "en"), "--data-config is for data sets, and"),
    ],
)
def test_options_of_data_sets_are_refused_for_files(
    run, train, predict, adapters, model_folder, option, message
):
    data = adapters / "pairs.csv"
    over = ["--over", "learning-rate", "0.1", "0.2", "--data", data, "--model", model_folder]
    for code, _, err in (train(data, *option), predict(data, *option), run("sweep", *over, *option)):
        assert code == 2
        assert message in err
        assert "pairs.csv is none: leave it out" in err


@pytest.mark.parametrize(
    "name, option, message",
    [
        ("t.jsonl", ("--separator", "tab"), "--separator is for .csv and .tsv files"),
        ("t.jsonl", ("--no-header",), "--no-header is for .csv, .tsv and .xlsx files"),
        ("t.csv", ("--sheet", "a"), "--sheet is for .xlsx files"),
        ("t.parquet", ("--encoding", "cp1252"), "--encoding is for .csv, .tsv, .jsonl and .json files"),
        ("folder", ("--encoding", "cp1252"), "--encoding is for .csv, .tsv, .jsonl and .json files"),
        ("t.csv", ("--separator", "ab"), "expected one character, or comma, semicolon, tab, pipe, got 'ab'"),
        ("t.csv", ("--encoding", "utf-9"), "no encoding is called 'utf-9'"),
        ("t.csv", ("--encoding", "base64"), "no encoding is called 'base64'"),
    ],
)
def test_options_of_files_are_refused_where_they_mean_nothing(train, tmp_path, name, option, message):
    (tmp_path / name).mkdir() if name == "folder" else (tmp_path / name).write_text("x")
    code, _, err = train(tmp_path / name, *option)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_a_table_in_another_form_is_trained_on_and_labelled(run, train, tmp_path):
    rows = "".join(f"café {i};{label}\n" for i in range(6) for label in ("gut", "böse"))
    (tmp_path / "t.csv").write_bytes(rows.encode("cp1252"))
    form = ["--encoding", "cp1252", "--separator", "semicolon", "--no-header"]
    assert train(tmp_path / "t.csv", *form, columns=("1", "2"))[0] == 0
    place = ["--adapter", tmp_path / "out", "--data", tmp_path / "t.csv", "--output", tmp_path / "p.csv"]
    assert run("predict", *place, *form)[0] == 0
    table = pd.read_csv(tmp_path / "p.csv")
    assert table.columns.tolist() == ["1", "2", "prediction"]
    assert table["1"].tolist() == [row.split(";")[0] for row in rows.splitlines()]


def test_options_of_files_are_for_those_of_two_tables_that_they_fit(train, tmp_path):
    (tmp_path / "t.csv").write_text("text;label\na;x\nb;y\n")
    (tmp_path / "e.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    code, _, err = train(tmp_path / "t.csv", "--separator", ";", "--eval-data", tmp_path / "e.jsonl")
    assert code == 0, err


def test_a_folder_with_a_loading_script_is_one_line(train, tmp_path):
    folder = Path(tmp_path / "reviews")
    folder.mkdir()
    (folder / "reviews.py").write_text("import datasets\n")
    code, _, err = train(folder)
    assert code == 2
    assert "is a data set with a loading script (reviews.py)" in err


def test_empty_cells_of_other_columns_are_nothing_and_counted(predict, make_table, monkeypatch):
    seen = prompts_seen(monkeypatch)
    code, _, err = predict(make_table([("x", ""), ("y", "z")], header=("premise", "hypothesis")))
    assert code == 0
    assert err == "softprompt: rows with nothing in column 'hypothesis', which the template reads: 1\n"
    assert "x\n =>" in seen


def test_what_a_table_calls_its_labels_makes_no_other_runs_of_a_sweep(run, model_folder, tmp_path):
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no_x", "x"])}
    rows = {"text": [f"w {i}" for i in range(12)], "label": [0, 1] * 6}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "set")
    words = pd.DataFrame({"text": rows["text"], "label": ["no x", "x"] * 6})
    words.to_csv(tmp_path / "words.csv", index=False)
    names = ["--text-column", "text", "--label-column", "label", "--model", model_folder, "--epochs", 1]
    more = ["--seeds", 1, "--over", "learning-rate", "0.1", "0.2", "--output", tmp_path / "sweep"]
    assert run("sweep", "--data", tmp_path / "set", *names, *more)[0] == 0
    code, out, _ = run("sweep", "--data", tmp_path / "words.csv", *names, *more)
    assert code == 0
    assert "2 runs, 2 of them done before" in out
