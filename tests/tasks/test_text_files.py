"""Files that are no plain CSV or JSONL in UTF-8: read where it is certain what they are, else named."""

import bz2
import gzip
import lzma
import zipfile

import pytest

from softprompt.tasks.errors import TaskError
from softprompt.tasks.table import read_table

BODY = "text,label\ncafé noir,gut\nthé,böse\n"
TEXTS = ["café noir", "thé"]
LINES = '{"text": "café noir", "label": "gut"}\n{"text": "thé", "label": "böse"}\n'

READ = {
    "a mark of UTF-16": (".csv", BODY.encode("utf-16"), {}),
    "a mark of UTF-16, the other order": (".csv", b"\xfe\xff" + BODY.encode("utf-16-be"), {}),
    "a mark of UTF-32": (".csv", BODY.encode("utf-32"), {}),
    "a mark of UTF-8": (".csv", BODY.encode("utf-8-sig"), {}),
    "a mark of UTF-8 and its name": (".csv", BODY.encode("utf-8-sig"), {"encoding": "utf-8"}),
    "JSONL in UTF-16": (".jsonl", LINES.encode("utf-16"), {}),
    "JSONL in Latin-1": (".jsonl", LINES.encode("latin-1"), {"encoding": "latin-1"}),
    "cp1252": (".csv", BODY.encode("cp1252"), {"encoding": "cp1252"}),
    "UTF-16 without a mark": (".csv", BODY.encode("utf-16-be"), {"encoding": "utf-16-be"}),
    "semicolons": (".csv", BODY.replace(",", ";").encode(), {"separator": ";"}),
    "tabs and quotes": (
        ".csv",
        BODY.replace(",", "\t").replace("thé", '"thé"').encode(),
        {"separator": "\t"},
    ),
    "carriage returns": (".csv", BODY.replace("\n", "\r\n").encode(), {}),
    "blank lines": (".csv", ("\n\n" + BODY.replace("\n", "\n  \n\n")).encode(), {}),
    "blank lines in JSONL": (".jsonl", LINES.replace("\n", "\n\n").encode(), {}),
    "TSV": (".tsv", BODY.replace(",", "\t").encode(), {}),
    "gzip": (".csv.gz", gzip.compress(BODY.encode("utf-16")), {}),
    "xz of semicolons": (".csv.xz", lzma.compress(BODY.replace(",", ";").encode()), {"separator": ";"}),
    "bzip2 of JSONL": (".jsonl.bz2", bz2.compress(LINES.encode()), {}),
    "an array": (".json", ("[" + ",".join(LINES.splitlines()) + "]").encode(), {}),
    "lines of JSON": (".json", LINES.encode(), {}),
    "gzip of lines of JSON": (".json.gz", gzip.compress(LINES.encode()), {}),
    "no line break at the end": (".csv", BODY.strip().encode(), {}),
}


@pytest.mark.parametrize("suffix, content, options", READ.values(), ids=READ)
def test_a_file_is_read_as_what_it_is(tmp_path, suffix, content, options):
    path = tmp_path / f"table{suffix}"
    path.write_bytes(content)
    table = read_table(path, "text", "label", **options)
    assert (table.texts, table.labels) == (TEXTS, ["gut", "böse"])


REFUSED = {
    "latin-1": (".csv", BODY.encode("latin-1"), {}, "byte 0xe9 in line 2 is not UTF-8", "--encoding cp1252"),
    "not cp1252 either": (".csv", b"text,label\na\xe9\x81,b\n", {}, "in latin-1", "--encoding latin-1"),
    "latin-1 JSONL": (".jsonl", LINES.encode("latin-1"), {}, "byte 0xe9 in line 1", "--encoding cp1252"),
    "UTF-16 without a mark": (".csv", BODY.encode("utf-16-le"), {}, "like UTF-16", "--encoding utf-16-le"),
    "UTF-16 of ASCII alone": (".csv", "text,label\na,b\n".encode("utf-16-be"), {}, "UTF-16", "utf-16-be"),
    "a wrong encoding": (".csv", BODY.encode(), {"encoding": "ascii"}, "is not ASCII", "another --encoding"),
    "a mark against the encoding": (
        ".csv",
        BODY.encode("utf-8-sig"),
        {"encoding": "cp1252"},
        "mark of utf-8",
        "out",
    ),
    "zero bytes": (".csv", b"text,label\na\x00,b\n", {}, "zero bytes", "give the table itself"),
    "half a bzip2": (".csv", bz2.compress(BODY.encode())[:20], {}, "compressed with bzip2", "unpack it"),
    "gzip": (".csv", gzip.compress(BODY.encode()), {}, "compressed with gzip", "unpack it"),
    "gzip as JSONL": (".jsonl", gzip.compress(b"{}"), {}, "compressed with gzip", "unpack it"),
    "gzip as Parquet": (".parquet", gzip.compress(b"{}"), {}, "compressed with gzip", "unpack it"),
    "xz": (".csv", lzma.compress(BODY.encode()), {}, "compressed with xz", "unpack it"),
    "a workbook": (".csv", b"PK\x03\x04...", {}, "as workbooks are", "rename it to .xlsx"),
    "Parquet": (".csv", b"PAR1...PAR1", {}, "is a Parquet file", "rename it to .parquet"),
    "a web page": (".csv", b"<!DOCTYPE html>\n<html>", {}, "is a web page", "download the table"),
    "JSON lines": (".csv", LINES.encode(), {}, "looks like JSON", "rename it to .jsonl"),
    "no gzip after all": (".csv.gz", BODY.encode(), {}, "not a readable .gz", "rename it to .csv"),
    "half a gzip": (".csv.gz", gzip.compress(BODY.encode())[:-9], {}, "not a readable .gz", "the whole file"),
    "compressed twice": (".csv.gz", gzip.compress(gzip.compress(b"a")), {}, "compressed with gzip", "unpack"),
    "no type inside": (".gz", gzip.compress(BODY.encode()), {}, "what is compressed", "table.csv.gz"),
    "commas in TSV": (".tsv", BODY.encode(), {}, "separated by commas", "--separator comma"),
    "a title": (".csv", b"Report\n" + BODY.encode(), {}, "a title above the header", "remove the lines"),
    "columns of JSON": (
        ".json",
        b'{"text": {"0": "a"}, "label": {"0": "b"}}',
        {},
        "of columns",
        "orient='rec",
    ),
    "rows under a key": (
        ".json",
        b'{"n": 1, "data": [{"text": "a"}]}',
        {},
        "under the key 'data'",
        "save that",
    ),
    "arrays of JSON": (".json", b'[["a", "b"]]', {}, "entry 1 of its array is a list", "orient='records'"),
    "half a JSON array": (".json", b'[{"text": "a"}, {"te', {}, "is not JSON", "cut short?"),
    "an array as JSONL": (".jsonl", b'[{"text": "a"}]', {}, "not a JSON object", "a .json file may"),
    "half a Parquet file": (".parquet", b"PAR1....", {}, "not a readable .parquet", "cut short?"),
    "semicolons": (".csv", b"text;label\na;b\n", {}, "separated by semicolons", "--separator semicolon"),
    "semicolons, commas in texts": (
        ".csv",
        b"text;label\na, c, d;b\n",
        {},
        "by semicolons",
        "--separator semic",
    ),
    "tabs": (".csv", b"text\tlabel\na\tb\n", {}, "separated by tabs", "--separator tab"),
    "commas after all": (
        ".csv",
        BODY.encode(),
        {"separator": "|"},
        "separated by commas",
        "--separator comma",
    ),
    "cut within a row": (".csv", b"text,label\na,b\nc", {}, "ends within line 3", "cut short?"),
    "cut within quotes": (".csv", b'text,label\na,b\n"c, d\n', {}, "mark that opens in line 3", "cut short?"),
    "cut within a character": (".csv", BODY.strip().encode()[:-3], {}, "middle of a character", "cut short?"),
    "latin-1 at its end": (
        ".csv",
        "text,label\na,thé".encode("latin-1"),
        {},
        "in line 2",
        "--encoding cp1252",
    ),
    "cut JSONL": (".jsonl", LINES.strip().encode()[:-3], {}, "line 2 is not JSON", "cut short?"),
    "no header, labels again": (".csv", b"a,x\nb,y\nc,x\n", {}, "looks like a row", "--no-header"),
    "no header, sentences": (
        ".csv",
        b"it crashed once again,x\nb,y\n",
        {},
        "looks like a row",
        "--no-header",
    ),
    "no header, numbers": (".csv", b"a,1\nb,0\n", {}, "looks like a row", "--no-header"),
}


@pytest.mark.parametrize("suffix, content, options, kind, remedy", REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_something_else_is_named_with_the_remedy(
    tmp_path, suffix, content, options, kind, remedy
):
    path = tmp_path / f"table{suffix}"
    path.write_bytes(content)
    with pytest.raises(TaskError) as error:
        read_table(path, "text", "label", **options)
    assert str(path) in str(error.value)
    assert kind in str(error.value)
    assert remedy in str(error.value)


def test_without_a_header_the_columns_have_numbers(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a b,x\nc,y\n")
    table = read_table(path, "1", "2", header=False)
    assert (table.texts, table.labels) == (["a b", "c"], ["x", "y"])
    assert table.frame.columns.tolist() == ["1", "2"]


BETWEEN = {
    "CSV": (".csv", 'text,n\n"a\n\nb",1\n{}c,2\n{}d,3\n', "\n", "line 5, 7", ["a\n\nb", "c", "d"]),
    "one column": (".csv", "text\na\n{}b\n", " \n\n", "line 3, 4", ["a", "b"]),
    "JSONL": (".jsonl", '{{"text": "a"}}\n{}{{"text": "b"}}\n', "\n", "line 2", ["a", "b"]),
}


@pytest.mark.parametrize("suffix, content, blank, lines, texts", BETWEEN.values(), ids=BETWEEN)
def test_blank_lines_between_rows_are_refused_where_every_line_counts(
    tmp_path, suffix, content, blank, lines, texts
):
    path = tmp_path / f"t{suffix}"
    path.write_text("\n" + content.format("", "") + "\n\n")  # around the rows they are no loss
    assert read_table(path, "text", every_line=True).texts == texts
    path.write_text(content.format(blank, blank))
    with pytest.raises(TaskError, match=rf"has empty lines between its rows \({lines}\)"):
        read_table(path, "text", every_line=True)
    table = read_table(path, "text")
    assert table.texts == texts
    assert table.notes == (f"blank lines between rows were left out: {lines.count(',') + 1}",)


def test_a_cell_may_be_longer_than_the_csv_module_lets_it_be(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,label\n" + "a" * 200_000 + ",x\n")
    assert read_table(path, "text", "label").texts == ["a" * 200_000]


def test_cells_without_a_name_keep_theirs_from_pandas_and_short_rows_are_filled(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(",text,note\n0,a\n1,b,c\n")
    frame = read_table(path, "text").frame
    assert frame.columns.tolist() == ["Unnamed: 0", "text", "note"]
    assert frame["note"].tolist() == ["", "c"]


@pytest.mark.parametrize("name", ["par1", "PK", "bzh", "BZh", "sqlite format 3", "pdf"])
def test_a_column_may_be_called_as_other_formats_begin(tmp_path, name):
    path = tmp_path / "t.csv"
    path.write_text(f"{name},label\na,x\nb,y\n", encoding="utf-8")
    table = read_table(path, name, "label")
    assert (table.texts, table.labels) == (["a", "b"], ["x", "y"])


def test_a_zip_is_read_where_one_file_is_in_it(tmp_path):
    path = tmp_path / "t.csv.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/._t.csv", b"x")
        archive.writestr("folder/t.csv", BODY)
    assert read_table(path, "text", "label").texts == TEXTS
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other.csv", BODY)
    with pytest.raises(TaskError, match=r"has 2 files in it .'folder/t.csv', 'other.csv'., expected one"):
        read_table(path, "text", "label")


@pytest.mark.parametrize("suffix", [".tsv", ".csv.gz"])
def test_cells_stay_text_in_every_form_of_a_csv_file(tmp_path, suffix):
    path, mark = tmp_path / f"t{suffix}", "\t" if suffix == ".tsv" else ","
    lines = [["text", "label", "id"], ["NA", "1.0", "007"], ["null", "0.5", "1e3"]]
    content = "\n".join(map(mark.join, lines)).encode() + b"\n"
    path.write_bytes(gzip.compress(content) if suffix == ".csv.gz" else content)
    table = read_table(path, "text", "label")
    assert (table.texts, table.labels) == (["NA", "null"], ["1.0", "0.5"])
    assert table.frame["id"].tolist() == ["007", "1e3"]
