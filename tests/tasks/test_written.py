"""What is written has every cell as it was, whatever the type of its column."""

import csv
import datetime
import json
import math
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softprompt.tasks.errors import TaskError
from softprompt.tasks.table import read_table
from softprompt.tasks.written import check_writable, write_frame

MOMENT = datetime.datetime(2024, 1, 1, 10, 11, 12, 345678)
HOUR_EAST = datetime.timezone(datetime.timedelta(hours=1))

# column -> (Arrow type, cell, what JSONL has, what CSV has)
CELLS = {
    "tiny": (pa.float64(), 1.5e-11, 1.5e-11, "1.5e-11"),
    "third": (pa.float64(), 1 / 3, 1 / 3, "0.3333333333333333"),
    "huge": (pa.float64(), 1.7976931348623157e308, 1.7976931348623157e308, "1.7976931348623157e+308"),
    "infinite": (pa.float64(), -math.inf, "-Infinity", "-inf"),
    "float32": (pa.float32(), 0.1, float(np.float32(0.1)), "0.1"),
    "int": (pa.int64(), 2**53 + 1, 2**53 + 1, "9007199254740993"),
    "unsigned": (pa.uint64(), 2**64 - 1, 2**64 - 1, "18446744073709551615"),
    "truth": (pa.bool_(), True, True, "True"),
    "text": (pa.string(), 'a, "b"\r\nc\r', 'a, "b"\r\nc\r', 'a, "b"\r\nc\r'),
    "return": (pa.string(), "a\rb", "a\rb", "a\rb"),
    "class": (pa.dictionary(pa.int8(), pa.string()), "x", "x", "x"),
    "moment": (pa.timestamp("us"), MOMENT, "2024-01-01T10:11:12.345678", "2024-01-01 10:11:12.345678"),
    "nanos": (
        pa.timestamp("ns"),
        pd.Timestamp("2024-01-01 10:11:12.345678901"),
        "2024-01-01T10:11:12.345678901",
        "2024-01-01 10:11:12.345678901",
    ),
    "zone": (
        pa.timestamp("s", "+01:00"),
        datetime.datetime(2024, 1, 1, 10, tzinfo=HOUR_EAST),
        "2024-01-01T10:00:00+01:00",
        "2024-01-01 10:00:00+01:00",
    ),
    "midnight": (pa.timestamp("us"), datetime.datetime(2024, 1, 1), "2024-01-01T00:00:00", "2024-01-01"),
    "date": (pa.date32(), datetime.date(2024, 1, 1), "2024-01-01", "2024-01-01"),
    "time": (pa.time64("us"), datetime.time(1, 2, 3), "01:02:03", "01:02:03"),
    "duration": (pa.duration("us"), datetime.timedelta(seconds=90), "P0DT0H1M30S", "0 days 00:01:30"),
    "price": (pa.decimal128(5, 2), Decimal("1.10"), "1.10", "1.10"),
    "list": (pa.list_(pa.float64()), [1.5] * 3000, [1.5] * 3000, json.dumps([1.5] * 3000)),
    "struct": (
        pa.struct({"a": pa.list_(pa.int64()), "at": pa.timestamp("us")}),
        {"a": [1], "at": MOMENT},
        {"a": [1], "at": "2024-01-01T10:11:12.345678"},
        '{"a": [1], "at": "2024-01-01T10:11:12.345678"}',
    ),
    "words": (pa.binary(), "ä".encode(), "ä", "ä"),
    "bytes": (pa.binary(), b"\xff\x00", "/wA=", "/wA="),
}


@pytest.fixture(scope="module")
def table():
    """Two rows: the cells above, and a row in which all but the text is missing."""
    columns = {name: pa.array([cell, None], kind) for name, (kind, cell, *_) in CELLS.items()}
    columns["text"] = pa.array([CELLS["text"][1], "b"])
    return pa.table(columns)


@pytest.fixture
def frame(table, tmp_path):
    pq.write_table(table, tmp_path / "in.parquet")
    return read_table(tmp_path / "in.parquet", "text").frame.assign(prediction=["x", "y"])


def test_jsonl_has_every_cell_as_json_has_it(frame, tmp_path):
    write_frame(frame, tmp_path / "out.jsonl")
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_bytes().decode().split("\n")[:-1])
    assert first == {name: expected for name, (_, _, expected, _) in CELLS.items()} | {"prediction": "x"}
    assert second == dict.fromkeys(CELLS) | {"text": "b", "prediction": "y"}


def test_csv_has_every_cell_as_text(frame, tmp_path):
    write_frame(frame, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        names, first, second = csv.reader(file)
    assert dict(zip(names, first, strict=True)) == {n: cell for n, (*_, cell) in CELLS.items()} | {
        "prediction": "x"
    }
    assert dict(zip(names, second, strict=True)) == dict.fromkeys(CELLS, "") | {
        "text": "b",
        "prediction": "y",
    }
    # A carriage return without quotation marks ends a row for pandas and for this project.
    assert read_table(tmp_path / "out.csv", "text").texts == [CELLS["text"][1], "b"]


def test_parquet_has_the_types_and_cells_that_it_had(frame, tmp_path):
    write_frame(frame, tmp_path / "out.parquet")
    back = pq.read_table(tmp_path / "out.parquet")
    assert back.drop_columns(["prediction"]).equals(pq.read_table(tmp_path / "in.parquet"))
    assert pd.read_parquet(tmp_path / "out.parquet")["list"][0].tolist() == [1.5] * 3000


INDICES = {
    "texts with a name": (pd.Index(["T-1", "T-2"], name="ticket"), {"ticket": ["T-1", "T-2"]}),
    "numbers with a name": (pd.Index([7, 3], name="ticket"), {"ticket": [7, 3]}),
    "a range with a name": (pd.RangeIndex(5, 9, 2, name="ticket"), {"ticket": [5, 7]}),
    "times without a name": (
        pd.DatetimeIndex(["2024-01-01", "2024-01-02"]),
        {"index": [pd.Timestamp("2024-01-01"), pd.Timestamp("2024-01-02")]},
    ),
    "two": (
        pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["kind", "number"]),
        {"kind": ["a", "b"], "number": [1, 2]},
    ),
    "row numbers": (pd.RangeIndex(2), {}),
    "row numbers of a selection": (pd.Index([4, 2]), {}),
}


@pytest.mark.parametrize("index, columns", INDICES.values(), ids=INDICES)
def test_the_index_of_a_data_frame_is_columns_unless_it_counts_rows(tmp_path, index, columns):
    pd.DataFrame({"text": ["a", "b"], "n": [1, 2]}, index=index).to_parquet(tmp_path / "t.parquet")
    found = read_table(tmp_path / "t.parquet", "text").frame
    assert {name: found[name].tolist() for name in found} == columns | {"text": ["a", "b"], "n": [1, 2]}


def test_an_index_and_a_column_of_one_name_are_refused(tmp_path):
    frame = pd.DataFrame({"text": ["a"], "id": [1]}, index=pd.Index(["x"], name="id"))
    frame.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(TaskError, match="several columns of the name 'id'"):
        read_table(tmp_path / "t.parquet", "text")


def test_columns_with_numbers_for_names_are_found_by_them(tmp_path):
    pd.DataFrame([["a", "x"]]).to_parquet(tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet", "0", "1").labels == ["x"]


def test_objects_and_halves_of_surrogate_pairs_survive_in_jsonl(tmp_path):
    line = '{"text": "a", "note": "\\ud83d", "n": 1, "deep": [{"x": 1e-12}], "id": 9007199254740993}'
    (tmp_path / "in.jsonl").write_text(line + '\n{"text": "ä"}\n', encoding="utf-8")
    frame = read_table(tmp_path / "in.jsonl", "text").frame
    write_frame(frame, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [json.loads(line), dict.fromkeys(rows[0]) | {"text": "ä"}]


@pytest.mark.parametrize(
    "name, cells, message",
    [
        ("out.parquet", [1, "one"], "a .parquet file needs one type in each column"),
        ("out.csv", ["\ud83d", "a"], "a .csv file needs text without halves of surrogate pairs"),
    ],
)
def test_what_a_file_cannot_hold_is_said_before_and_leaves_nothing(tmp_path, name, cells, message):
    frame = pd.DataFrame({"a": pd.Series(cells, dtype=object)})
    for write in (check_writable, write_frame):
        with pytest.raises(TaskError, match=message):
            write(frame, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_column_of_empty_cells_alone_has_a_line_for_each(tmp_path):
    write_frame(pd.DataFrame({"a": ["", " ", "b"]}), tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == 'a\n""\n" "\nb\n'
