"""Runs on real tables: which rows a fold has, what is measured again, and what the page says."""

import csv

import pytest

from benchmarks import tasks
from benchmarks.__main__ import main
from benchmarks.report import BEGIN, END, TASKS_BEGIN, TASKS_END, ReportError, report
from benchmarks.tasks import Cell, Source, cells_of, measure_cells, read_cells, tasks_page

ROWS = [(f"text {i}", "rare" if i % 5 == 0 else "often") for i in range(25)]


@pytest.fixture
def source(tmp_path, monkeypatch):
    folder = tmp_path / "table"
    folder.mkdir()
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *ROWS])
    monkeypatch.setitem(tasks.SOURCES, "small", Source(folder, "text", "label", 5))
    return folder


@pytest.fixture
def trained(monkeypatch):
    """What would have been trained: options, and the rows to train on and to measure."""
    calls = []

    def train_metrics(model, options):
        given = dict(zip(options[::2], options[1::2], strict=True))
        parts = {}
        for name in ("--data", "--eval-data"):
            with open(given[name], newline="") as file:
                parts[name] = [(row["text"], row["label"]) for row in csv.DictReader(file)]
        calls.append((given, parts))
        rare = sum(label == "rare" for _, label in parts["--eval-data"])
        often = len(parts["--eval-data"]) - rare
        return dict.fromkeys(tasks.KEPT) | {
            "train_rows": len(parts["--data"]),
            "eval_rows": rare + often,
            "validation_rows": 0,
            "seconds": 60.0,
            "labels": ["often", "rare"],
            "eval_exact_match": often / (rare + often),
            "eval_confusion": [[often, 0], [rare, 0]],
            "majority": {"label": "often", "exact_match": often / (rare + often)},
            "zero_shot": {"exact_match": 0.5},
            "history": [{"eval_seconds": 1.0}],
        }

    monkeypatch.setattr(tasks, "train_metrics", train_metrics)
    return calls


def test_every_row_is_measured_once_and_labels_are_spread_over_the_folds(source, trained, tmp_path):
    cells = list(cells_of(["small"], ["defaults"], [0]))
    measure_cells("model", "name", cells, tmp_path / "results")
    measured = [row for _, parts in trained for row in parts["--eval-data"]]
    assert sorted(measured) == sorted(ROWS)
    for given, parts in trained:
        assert sorted(parts["--data"] + parts["--eval-data"]) == sorted(ROWS)
        assert [label for _, label in parts["--eval-data"]].count("rare") == 1
        assert given["--seed"] == "0"


def test_what_is_in_the_file_is_not_measured_again(source, trained, tmp_path):
    cells = list(cells_of(["small"], ["defaults", "length 8"], [0, 1]))
    assert cells[0] == Cell("small", "defaults", 0, 0)
    file = measure_cells("model", "name", cells[:3], tmp_path / "results")
    assert measure_cells("model", "name", cells, tmp_path / "results", minutes=-1) == file
    assert len(trained) == len(read_cells(file)) == 3
    measure_cells("model", "name", cells, tmp_path / "results")
    assert len(trained) == len(read_cells(file)) == 20
    assert [given.get("--num-virtual-tokens") for given, _ in trained].count("8") == 10


def test_the_page_has_the_scores_over_all_folds(source, trained, tmp_path):
    page = tmp_path / "results.md"
    page.write_text(f"top\n{TASKS_BEGIN}\n{TASKS_END}\nend\n")
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    report(tmp_path / "results", readme, tasks=page)
    assert "Not measured yet." in page.read_text()
    cells = list(cells_of(["small"], ["defaults", "article"], [0]))
    measure_cells("model", "name", cells[:7], tmp_path / "results")
    measure_cells("model", "name", list(cells_of(["small"], ["defaults"], [1])), tmp_path / "results")
    written = report(tmp_path / "results", readme, tasks=page)
    assert page in written
    text = page.read_text()
    assert text.startswith("top\n")
    assert text.endswith("end\n")
    # 20 of 25 right; F1 of the frequent label 40 / 45, of the rare one 0.
    scores = "80.0% (0.44), 2 seeds 80.0% to 80.0% | 80.0% (0.44), 2 of 5 folds"
    assert f"| `small` | 25, 5-fold | 80.0% | 50.0% | {scores} |" in text
    assert "12 runs, 0.2 hours, on " in text


def test_a_page_without_its_markers_is_named(tmp_path):
    page, readme = tmp_path / "results.md", tmp_path / "README.md"
    page.write_text("nothing")
    readme.write_text(f"{BEGIN}\n{END}\n")
    with pytest.raises(ReportError, match="tasks:begin"):
        report(tmp_path / "results", readme, tasks=page)


def test_a_table_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tasks.SOURCES, "emotion", Source(tmp_path / "none", "text", "label", 1))
    arguments = ["--model", "model", "--tables", "emotion", "--output", str(tmp_path / "results")]
    assert main(["tasks", *arguments]) == 2
    assert capsys.readouterr().err == f"benchmarks: {tmp_path / 'none' / 'train.csv'} is not there\n"


def test_a_page_without_a_file_has_no_parts(tmp_path):
    assert tasks_page([tmp_path]) == []
