"""Tables as people have them, through the commands: each trains and is labelled as the same rows in a plain
CSV file are, or one line says what to do.
"""

import gzip
import json

import pandas as pd
import pytest

datasets = pytest.importorskip("datasets")
openpyxl = pytest.importorskip("openpyxl")

TEXTS = [f"café №{i}: {'wörks, at last' if i % 3 else 'broke'}" for i in range(12)]
WORDS = ["gut" if i % 3 else "böse" for i in range(12)]
DIGITS = ["1" if i % 3 else "0" for i in range(12)]
CP1252 = [text.replace("№", "") for text in TEXTS]


@pytest.fixture(scope="module")
def call(model_folder, tmp_path_factory):
    """Train on a table, or label it with what was trained, in a few steps; returns where the output is."""
    from softprompt.cli import main

    folder = tmp_path_factory.mktemp("messy")

    def run(command, data, *more, columns=("text", "label")):
        out = folder / "out" if command == "train" else folder / "labelled.csv"
        options = ["--text-column", columns[0], "--label-column", columns[1], "--overwrite", *more]
        if command == "train":
            options += ["--model", model_folder, "--template", "{text} =>", "--epochs", 1, "--eval-share", 0]
        else:
            options += ["--adapter", folder / "out", "--score"]
        arguments = [command, "--data", data, "--output", out, *options]
        assert main([str(argument) for argument in arguments]) == 0
        return out

    return run


def rows_hash(folder):
    """Of the texts and labels that were trained on, in their order."""
    return json.loads((folder / "softprompt.json").read_text(encoding="utf-8"))["training"]["rows"]


def scores(path, names=("böse", "gut")):
    """The prediction of each row, and the probabilities of two labels."""
    table = pd.read_csv(path, dtype=str)
    shares = table[[f"p({name})" for name in names]].astype(float).round(5)
    return table["prediction"].tolist(), shares.values.tolist()


@pytest.fixture(scope="module")
def plain(call, tmp_path_factory):
    """What plain CSV files give, by their texts and labels: the hash of the rows, and their scores."""
    known = {}

    def find(texts, labels, names=("böse", "gut")):
        key = (tuple(texts), tuple(labels))
        if key not in known:
            path = tmp_path_factory.mktemp("plain") / "t.csv"
            pd.DataFrame({"text": texts, "label": labels}).to_csv(path, index=False)
            known[key] = rows_hash(call("train", path)), scores(call("predict", path), names)
        return known[key]

    return find


@pytest.fixture
def refused(run, capsys, model_folder):
    """Train on a table that is refused, and return the one line that says why."""

    def train(data, *more):
        capsys.readouterr()
        names = ["--text-column", "text", "--label-column", "label", "--model", model_folder]
        code, out, err = run("train", "--data", data, *names, *more)
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err

    return train


def test_tsv_in_utf_16_with_its_mark(call, plain, tmp_path):
    rows, expected = plain(TEXTS, WORDS)
    frame = pd.DataFrame({"text": TEXTS, "label": WORDS})
    frame.to_csv(tmp_path / "t.tsv", sep="\t", index=False, encoding="utf-16")
    assert rows_hash(call("train", tmp_path / "t.tsv")) == rows
    assert scores(call("predict", tmp_path / "t.tsv")) == expected


def test_csv_of_older_excel_with_semicolons(call, plain, refused, tmp_path):
    rows, expected = plain(CP1252, WORDS)
    path = tmp_path / "t.csv"
    pd.DataFrame({"text": CP1252, "label": WORDS}).to_csv(path, sep=";", index=False, encoding="cp1252")
    assert "give --encoding cp1252" in refused(path)
    assert "give --separator semicolon" in refused(path, "--encoding", "cp1252")
    form = ["--encoding", "cp1252", "--separator", "semicolon"]
    assert rows_hash(call("train", path, *form)) == rows
    assert scores(call("predict", path, *form)) == expected


def test_a_workbook_with_a_blank_row_and_numbers_for_labels(call, plain, run, capsys, tmp_path):
    rows, expected = plain(TEXTS, DIGITS, ("0", "1"))
    book = openpyxl.Workbook()
    book.active.append(["id", "label", "text"])
    for i, (text, label) in enumerate(zip(TEXTS, DIGITS, strict=True)):
        book.active.append([i, float(label), text])
    book.save(tmp_path / "t.xlsx")
    book.active.insert_rows(5)
    book.save(tmp_path / "blank.xlsx")
    assert rows_hash(call("train", tmp_path / "blank.xlsx")) == rows
    assert "blank.xlsx: blank lines between rows were left out: 1\n" in capsys.readouterr().err
    adapter = call("train", tmp_path / "blank.xlsx")
    place = ["--adapter", adapter, "--output", tmp_path / "out.csv"]
    code, _, err = run("predict", "--data", tmp_path / "blank.xlsx", *place)
    assert (code, err.splitlines()[-1].count("has empty lines between its rows (line 5)")) == (2, 1)
    assert scores(call("predict", tmp_path / "t.xlsx"), ("0", "1")) == expected
    assert run("predict", "--data", tmp_path / "t.xlsx", *place[:3], tmp_path / "out.xlsx")[0] == 0
    labelled = pd.read_excel(tmp_path / "out.xlsx", dtype={"prediction": str})
    assert labelled[["id", "text", "prediction"]].values.tolist() == [
        [i, text, label] for i, (text, label) in enumerate(zip(TEXTS, expected[0], strict=True))
    ]


def test_a_json_array_in_gzip(call, plain, tmp_path):
    rows, expected = plain(TEXTS, WORDS)
    content = [{"label": label, "text": text} for text, label in zip(TEXTS, WORDS, strict=True)]
    (tmp_path / "t.json.gz").write_bytes(gzip.compress(json.dumps(content, indent=1).encode()))
    assert rows_hash(call("train", tmp_path / "t.json.gz")) == rows
    assert scores(call("predict", tmp_path / "t.json.gz")) == expected


def test_csv_without_a_header(call, plain, refused, tmp_path):
    rows, expected = plain(TEXTS, WORDS)
    path = tmp_path / "t.csv"
    pd.DataFrame({"label": WORDS, "text": TEXTS}).to_csv(path, index=False, header=False)
    assert "give --no-header, and name the columns by their numbers" in refused(path)
    assert rows_hash(call("train", path, "--no-header", columns=("2", "1"))) == rows
    assert scores(call("predict", path, "--no-header", columns=("2", "1"))) == expected


def test_numbers_of_classes_in_parquet_with_words_for_them(call, plain, tmp_path):
    rows, (predictions, shares) = plain(TEXTS, WORDS)
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["böse", "gut"])}
    columns = {"text": TEXTS, "label": list(map(int, DIGITS))}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(tmp_path / "t.parquet")
    adapter = call("train", tmp_path / "t.parquet", "--label-map", "0=böse", "1=gut")
    assert rows_hash(adapter) == rows
    numbers = {"böse": "0", "gut": "1"}
    labelled = scores(call("predict", tmp_path / "t.parquet"), ("0", "1"))
    assert labelled == ([numbers[label] for label in predictions], shares)


@pytest.mark.parametrize("way", [(), ("--generate",)], ids=["likeliest", "generated"])
def test_csv_with_empty_texts(call, plain, run, refused, capsys, tmp_path, way):
    rows, (predictions, shares) = plain(TEXTS, WORDS)
    path, lines = tmp_path / "t.csv", list(zip(TEXTS, WORDS, strict=True))
    empty = [("", "gut"), (" ", "")]
    table = pd.DataFrame([*lines[:5], *empty, *lines[5:]], columns=["text", "label"])
    table.to_csv(path, index=False)
    assert "row 6 (counted from 1, without the header) has an empty text" in refused(path)
    adapter = call("train", path, "--skip-empty")
    assert rows_hash(adapter) == rows
    assert "t.csv: rows without a text and a label were skipped: 2\n" in capsys.readouterr().err
    place = ["--adapter", adapter, "--data", path, "--output", tmp_path / "out.jsonl", *way]
    code, _, err = run("predict", *place)
    assert (code, err.count("remove the row, or give --skip-empty")) == (2, 1)
    code, out, err = run("predict", *place, "--skip-empty")
    assert (code, "12 rows labelled" in out) == (0, True)
    assert "t.csv: rows without a text were skipped: 2\n" in err
    labelled = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [row["text"] for row in labelled] == table["text"].tolist()
    found = [row["prediction"] for row in labelled]
    assert found[5:7] == [None, None]
    if not way:
        assert found[:5] + found[7:] == predictions
        table = pd.read_csv(call("predict", path, "--skip-empty"))
        assert table["p(gut)"].round(5).dropna().tolist() == [gut for _, gut in shares]


def test_json_lines_with_floats_for_labels(call, plain, tmp_path):
    rows, (predictions, shares) = plain(TEXTS, DIGITS, ("0", "1"))
    path = tmp_path / "t.jsonl"
    pd.DataFrame({"text": TEXTS, "label": list(map(float, DIGITS))}).to_json(
        path, orient="records", lines=True
    )
    path.write_text(
        path.read_text().replace('"label":1}', '"label":1.0}').replace('"label":0}', '"label":0.0}')
    )
    assert path.read_text().count(".0}") == 12
    assert rows_hash(call("train", path)) == rows
    labelled = scores(call("predict", path), ("0.0", "1.0"))
    assert labelled == ([f"{label}.0" for label in predictions], shares)
    metrics = json.loads(call("predict", path).with_suffix(".metrics.json").read_text())
    assert metrics["labels"] == ["0.0", "1.0"]
    assert metrics["rows"] == 12


def test_rows_without_a_label_are_labelled_and_not_measured(call, run, tmp_path, read_json):
    path = tmp_path / "t.csv"
    pd.DataFrame({"text": TEXTS, "label": WORDS}).to_csv(path, index=False)
    adapter = call("train", path)
    pd.DataFrame({"text": ["", *TEXTS], "label": ["gut", "", *WORDS[1:]]}).to_csv(path, index=False)
    place = ["--adapter", adapter, "--data", path, "--output", tmp_path / "p.parquet", "--skip-empty"]
    code, out, _ = run("predict", *place)
    assert code == 0
    assert "of the 11 rows with text and label" in out
    table = pd.read_parquet(tmp_path / "p.parquet")
    assert table["prediction"].isna().tolist() == [True] + [False] * 12
    metrics = read_json(tmp_path / "p.metrics.json")
    assert metrics["rows"] == 11
    assert metrics["accuracy"] == (table["prediction"] == table["label"])[2:].mean()


def test_a_generation_task_with_empty_texts_and_targets(call, run, tmp_path, read_json):
    targets = [f"{word} {i}" for i, word in enumerate(WORDS)]
    path = tmp_path / "t.csv"
    pd.DataFrame({"text": TEXTS, "label": targets}).to_csv(path, index=False)
    rows = rows_hash(call("train", path, "--task", "generate"))
    pd.DataFrame({"text": ["", *TEXTS], "label": ["x", *targets]}).to_csv(path, index=False)
    adapter = call("train", path, "--task", "generate", "--skip-empty")
    assert rows_hash(adapter) == rows
    pd.DataFrame({"text": ["", *TEXTS], "label": ["x", "", *targets[1:]]}).to_csv(path, index=False)
    place = ["--adapter", adapter, "--data", path, "--output", tmp_path / "p.jsonl", "--skip-empty"]
    code, out, _ = run("predict", *place)
    assert code == 0
    assert "12 texts written" in out
    assert "of the 11 rows with text and label" in out
    written = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text("utf-8").splitlines()]
    assert [row["prediction"] is None for row in written] == [True] + [False] * 12
    metrics = read_json(tmp_path / "p.metrics.json")
    assert metrics["rows"] == 11
