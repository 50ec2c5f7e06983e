"""Workbooks of Excel: what is written is read back, what Excel shows is what is read, and damage is named."""

import datetime
import json
import math
import sys
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt.tasks.errors import TaskError
from softprompt.tasks.table import read_table
from softprompt.tasks.text_files import check_source
from softprompt.tasks.written import check_writable, check_writable_type, write_frame

openpyxl = pytest.importorskip("openpyxl")

MOMENT = datetime.datetime(2024, 2, 29, 10, 11, 12, 345000)
EAST = datetime.timezone(datetime.timedelta(hours=1))
MESSY = [
    "=1+1",
    "=",
    "#N/A",
    "12",
    "1e5",
    "TRUE",
    "a\r\nb\rc\n",
    " x ",
    "\x0b\x00\x1f",
    "_x000D_",
    "_x005F_x000D_",
]
MESSY += ["_x0041_", "\ufffe", "ä😀", "'", "-", "@a", "", "nan", "2024-01-01", "_", "__x000d_"]


@pytest.fixture
def sheet(tmp_path):
    """Write sheets of lines with openpyxl, and return the path of the workbook."""

    def make(*lines, name="t.xlsx", **others):
        book = openpyxl.Workbook()
        for title, rows in {"first": lines, **others}.items():
            page = book.active if title == "first" else book.create_sheet()
            page.title = title
            for row in rows:
                page.append(row)
        book.save(tmp_path / name)
        return tmp_path / name

    return make


def back(frame, path):
    write_frame(frame, path)
    return read_table(path, str(frame.columns[0])).frame


@pytest.mark.parametrize("text", MESSY)
def test_a_text_comes_back_whatever_excel_would_make_of_it(tmp_path, text):
    frame = pd.DataFrame({"text": ["first"], text + "name": [text]})
    found = back(frame, tmp_path / "t.xlsx")
    assert found.columns.tolist() == frame.columns.tolist()
    assert found.iloc[0, 1] == (text or None)


def test_a_text_is_no_formula_for_other_programs(tmp_path):
    write_frame(pd.DataFrame({"text": ["=1+1", "#N/A"]}), tmp_path / "t.xlsx")
    cells = openpyxl.load_workbook(tmp_path / "t.xlsx").active["A"]
    assert [(cell.value, cell.data_type) for cell in cells[1:]] == [("=1+1", "s"), ("#N/A", "s")]


# cell -> what is read of it
CELLS = [
    (None, None),
    (float("nan"), None),
    (pd.NA, None),
    (True, True),
    (1, 1),
    (1.0, 1),
    (-0.1, -0.1),
    (0.1 + 0.2, 0.30000000000000004),
    (1.5e-300, 1.5e-300),
    (1e300, 1e300),
    (math.inf, "Infinity"),
    (2**53, 2**53),
    (2**53 + 1, "9007199254740993"),
    (np.int8(3), 3),
    (np.float32(0.5), 0.5),
    (Decimal("1.10"), "1.10"),
    (MOMENT, MOMENT),
    (pd.Timestamp(MOMENT), MOMENT),
    (MOMENT.replace(microsecond=345678), "2024-02-29T10:11:12.345678"),
    (MOMENT.replace(tzinfo=EAST), "2024-02-29T10:11:12.345000+01:00"),
    (pd.Timestamp(MOMENT, tz="UTC"), "2024-02-29T10:11:12.345000+00:00"),
    (datetime.date(2024, 2, 29), datetime.date(2024, 2, 29)),
    (datetime.datetime(2024, 2, 29), datetime.date(2024, 2, 29)),
    (datetime.date(1899, 12, 31), "1899-12-31"),
    (datetime.date(1750, 1, 1), "1750-01-01"),
    (datetime.time(1, 2, 3), datetime.time(1, 2, 3)),
    (datetime.timedelta(hours=30, seconds=1), datetime.timedelta(hours=30, seconds=1)),
    (datetime.timedelta(seconds=-1), "P-1DT23H59M59S"),
    ([1, "ä"], '[1, "ä"]'),
    ({"a": None}, '{"a": null}'),
    (b"\xff\x00", "/wA="),
]


@pytest.mark.parametrize("cell, expected", CELLS, ids=lambda cell: repr(cell)[:40])
def test_a_cell_comes_back_as_it_was_or_as_text(tmp_path, cell, expected):
    frame = pd.DataFrame({"text": ["a", "b"], "x": pd.Series([cell, 5], dtype=object)})
    found = back(frame, tmp_path / "t.xlsx")["x"].tolist()
    assert found == [expected, 5]
    assert [type(value) for value in found] == [type(expected), int]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
cells = st.none() | st.booleans() | texts | st.sampled_from(MESSY) | numbers


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(texts.map(lambda text: f"{text}."), cells, cells), min_size=1, max_size=5))
def test_the_same_content_gives_the_same_rows_again(tmp_path, rows):
    frame = pd.DataFrame(rows, columns=["text", "=x", "#REF!"], dtype=object)
    found = back(frame, tmp_path / "t.xlsx")
    expected = [[None if cell == "" else cell for cell in row] for row in frame.values.tolist()]
    assert found.values.tolist() == expected
    write_frame(found, tmp_path / "again.jsonl")
    assert [list(json.loads(line).values()) for line in (tmp_path / "again.jsonl").open()] == expected


def test_whole_numbers_are_integers_and_days_are_dates(sheet):
    day, moment = datetime.datetime(2024, 1, 2), datetime.datetime(2024, 1, 2, 3, 4)
    path = sheet(["text", "label", "day", "moment"], ["a", 1.0, day, day], ["b", 0.5, None, moment])
    table = read_table(path, "text", "label")
    assert table.labels == ["1", "0.5"]
    assert table.frame["day"].tolist() == [day.date(), None]
    assert table.frame["moment"].tolist() == [day, moment]


def test_the_escapes_of_excel_are_the_characters_that_they_are_for(sheet):
    path = sheet(["text"], ["a_x000D_\nb _x000b_ c_x0041_"])
    assert read_table(path, "text").texts == ["a\r\nb \x0b c_x0041_"]


def test_blank_rows_are_left_out_around_rows_and_counted_between_them(sheet):
    lines = [[], ["text", "label"], [], ["a", "x"], [None, " "], [], ["b", "y"], [], [None]]
    path = sheet(*lines)
    table = read_table(path, "text", "label")
    assert (table.texts, table.labels) == (["a", "b"], ["x", "y"])
    assert table.notes == ("blank lines between rows were left out: 3",)
    with pytest.raises(TaskError, match=r"has empty lines between its rows \(line 3, 5, 6\)"):
        read_table(path, "text", every_line=True)


def test_a_sheet_is_chosen_by_name_and_the_first_one_with_a_note(sheet):
    path = sheet(["text"], ["a"], other=[["text"], ["b"]])
    first = read_table(path, "text")
    assert first.texts == ["a"]
    assert first.notes == ("only the first of its sheets was read ('first', 'other'); --sheet names another",)
    other = read_table(path, "text", sheet="other")
    assert (other.texts, other.notes) == (["b"], ())
    with pytest.raises(TaskError, match="has no sheet 'third': name one of 'first', 'other'"):
        read_table(path, "text", sheet="third")
    with pytest.raises(TaskError, match="its sheets are 'first', 'other': name the one of the table with"):
        read_table(path, "label")
    with pytest.raises(TaskError, match="has no rows: its sheets are 'first', 'other'"):
        read_table(sheet([], other=[["text"], ["b"]]), "text")


def test_the_sheet_of_a_chart_is_none(tmp_path):
    book = openpyxl.Workbook()
    book.active.title = "rows"
    for row in (["text"], ["a"]):
        book.active.append(row)
    chart = openpyxl.chart.BarChart()
    chart.add_data(openpyxl.chart.Reference(book["rows"], min_col=1, min_row=1, max_row=2))
    book.create_chartsheet("chart", 0).add_chart(chart)
    book.save(tmp_path / "t.xlsx")
    table = read_table(tmp_path / "t.xlsx", "text")
    assert (table.texts, table.notes) == (["a"], ())
    with pytest.raises(TaskError, match="has no sheet 'chart': name one of 'rows'"):
        read_table(tmp_path / "t.xlsx", "text", sheet="chart")


def test_without_a_header_the_columns_of_a_sheet_have_numbers(sheet):
    path = sheet(["a b", 1], ["c", 0, "note"])
    table = read_table(path, "1", "2", header=False)
    assert (table.texts, table.labels) == (["a b", "c"], ["1", "0"])
    assert table.frame["3"].tolist() == [None, "note"]
    with pytest.raises(TaskError, match="looks like a row and not like a header: give --no-header"):
        read_table(path, "text")
    with pytest.raises(TaskError, match="looks like a title above the header"):
        read_table(sheet(["Report"], ["text", "label"], ["a", "b"]), "text")


def test_columns_of_one_name_are_refused_and_those_without_get_one(sheet):
    with pytest.raises(TaskError, match="several columns of the name 'text'"):
        read_table(sheet(["text", "text"], ["a", "b"]), "text")
    assert read_table(sheet(["text", None, 3], ["a", "b", "c"]), "3").frame.columns.tolist() == [
        "text",
        "Unnamed: 1",
        "3",
    ]


def test_a_file_that_is_no_whole_workbook_is_one_line_with_the_remedy(sheet, tmp_path):
    whole = sheet(["text"], *[[f"row {i}"] for i in range(50)]).read_bytes()
    zipped = tmp_path / "z.csv.zip"
    write_frame(pd.DataFrame({"text": ["a"]}), zipped)
    bad = {
        "old Excel: save it as .xlsx": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
        "has a password: save it without one": b"\xd0\xcf\x11\xe0" + "EncryptedPackage".encode("utf-16-le"),
        "was it cut short? Give the whole file": whole[: len(whole) // 2],
        "it is no workbook: rename it to its type": b"text,label\na,b\n",
        "is a web page": b"<html><table></table></html>",
        "is a Parquet file": b"PAR1",
        "save it as .xlsx with Excel or LibreOffice": zipped.read_bytes(),
    }
    path = tmp_path / "t.xlsx"
    for message, content in bad.items():
        path.write_bytes(content)
        with pytest.raises(TaskError) as error:
            read_table(path, "text")
        assert f"{path} is not a readable .xlsx table: " in str(error.value)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_damaged_part_of_a_workbook_is_one_line(sheet):
    path = sheet(["text"], ["a" * 300])
    content = bytearray(path.read_bytes())
    start = content.index(b"xl/worksheets/sheet1.xml") + 24
    content[start : start + 60] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(TaskError, match=r"is not a readable \.xlsx table: .* save it as \.xlsx"):
        read_table(path, "text")


@pytest.mark.parametrize("name", ["t.xls", "t.ods", "t.xlsm"])
def test_a_workbook_of_another_type_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xd0\xcf\x11\xe0")
    with pytest.raises(TaskError, match=rf"{name} is a workbook of another type: save it as \.xlsx"):
        read_table(tmp_path / name, "text")


@pytest.mark.parametrize(
    "frame, message",
    [
        ({"a": ["x", "😀" * 16_384]}, "row 2 has 32,768 characters in column 'a', at most 32,767"),
        ({"a": ["\r" * 5_000]}, "row 1 has 35,000 characters"),
        ({"a" * 40_000: ["x"]}, "row 0 has 40,000 characters"),
        ({"a": ["\ud83d"]}, "surrogates not allowed"),
        ({str(i): ["x"] for i in range(2**14 + 1)}, "16,385 columns, at most 1,048,575 and 16,384"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_a_sheet_cannot_hold_is_refused_before_the_work(tmp_path, frame, message):
    for write in (check_writable, write_frame):
        with pytest.raises(TaskError, match=r"a \.xlsx file needs what a sheet of Excel can hold") as error:
            write(pd.DataFrame(frame, dtype=object), tmp_path / "out.xlsx")
        assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_longest_text_of_a_cell_is_held(tmp_path):
    text = "a" * 32_767
    assert back(pd.DataFrame({"text": [text]}), tmp_path / "t.xlsx")["text"].tolist() == [text]


def test_without_openpyxl_the_extra_is_named(sheet, tmp_path, monkeypatch):
    path = sheet(["text"], ["a"])
    monkeypatch.setattr(
        "softprompt.tasks.text_files.find_spec", lambda name: None if name == "openpyxl" else sys
    )
    for check in (check_source, check_writable_type):
        with pytest.raises(TaskError, match=r"needs the package openpyxl: run pip install '\.\[cli\]'"):
            check(path)
        check(tmp_path.joinpath("t.csv").write_text("text\na\n") and tmp_path / "t.csv")
