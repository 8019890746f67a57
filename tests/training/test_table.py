"""CSV files as spreadsheets and databases write them: read right, or refused with the line."""

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrnn.training import InputError, SeriesData
from fastrnn.training.data.table import CsvFormat, parse_csv

VALUES = [0.25, -3.5, 1234.5, 7.0]


def parse(text: str, *columns: str, **form: Any) -> tuple[list[float], list[int]]:
    """The first column's values, and the lines they stand in."""
    table = parse_csv(text, list(columns) or ["load"], CsvFormat(**form), "x.csv")
    return table.values[:, 0].tolist(), table.lines


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("load,t\n0.25,0\n-3.5,1\n1234.5,2\n7,3\n", {}),
        ("t, load\n0, 0.25\n1, -3.5\n2, 1234.5\n3, 7\n", {}),
        ('t, "load"\n0, "0.25"\n1, "-3.5"\n2, "1234.5"\n3, "7"\n', {}),
        ('"load" ,"t" \n"0.25" ,0\n-3.5,"1" \n1234.5,2\n7,"a ""b"" , c"\n', {}),
        ("load ,t\n0.25 ,0\n-3.5 ,1\n1234.5\t,2\n7 ,3\n", {}),
        ("load;t\n0,25;0\n-3,5;1\n1234,5;2\n7;3\n", {"sep": ";", "decimal": ","}),
        ("load;t\n0,25;0\n-3,5;1\n1.234,5;2\n7;3\n", {"sep": ";", "decimal": ",", "thousands": "."}),
        (
            "load;t\n0,25;0\n-3,5;1\n1\u202f234,5;2\n7;3\n",
            {"sep": ";", "decimal": ",", "thousands": "\u202f"},
        ),
        ('load,t\n0.25,0\n-3.5,1\n"1,234.5",2\n7,3\n', {"thousands": ","}),
        ('load,t\n"0,25",0\n"-3,5",1\n"1234,5",2\n7,3\n', {"decimal": ","}),
        ("load\tt\n0.25\t0\n-3.5\t1\n1234.5\t2\n7\t3\n", {"sep": "\t"}),
        ("load\tt\n0.25\t0\n-3.5\t1\n1234.5\t2\n7\t3\n", {"sep": r"\t"}),
        ("  load   t\n  0.25 0\n -3.5 \t 1\n1234.5 2\n7       3\n", {"sep": r"\s+"}),
        ("load,t,\n0.25,0,\n-3.5,1,\n1234.5,2,\n7,3,\n", {}),
        ("load,t\n0.25,0,\n-3.5,1\n1234.5,2,\n7,3\n", {}),
        ("sep=,\nload,t\n0.25,0\n-3.5,1\n1234.5,2\n7,3\n", {"skiprows": 1}),
        ("# by hand\nload,t\n0.25,0 # first\n  # next\n-3.5,1\n1234.5,2\n7,3\n", {"comment": "#"}),
        ('load,t\n0.25,"a\n# b"\n-3.5,"# c" # d\n1234.5,\n7,', {"comment": "#"}),
        ("load\n0.25\n  # next\n-3.5\n1234.5\n7\n", {"comment": "#"}),
        ('"load","no\nte"\n0.25,"a\nb"\n-3.5,"1 ""x"", 2"\n1234.5,\n7,3\n\n\n', {}),
        ("load\n2.5e-1\n-35E-1\n+1234.5\n7.\n\n \n", {}),
        ("load,note\n0.25\n-3.5\n1234.5\n7", {}),
        (f'load,note\n0.25\n-3.5,"{"y" * 200_000}"\n1234.5\n7', {}),
    ],
)
def test_files_are_read_by_their_format(text: str, form: dict[str, Any]) -> None:
    assert parse(text, **form)[0] == VALUES


def test_missing_values_are_named_or_interpolated_where_they_stand() -> None:
    text = "load,t\n1,0\nNA,1\n,2\n-999,3\n-999.0,4\n?,5\nnull,6\n7\n"
    values, lines = parse(text, na_values=[-999, "?"])
    assert np.isnan(values[1:7]).all()
    assert (values[0], values[7]) == (1, 7)
    assert lines == list(range(2, 10))
    values, lines = parse("load\n1\n\n3\n  \n5\n\n\n")  # blank lines are steps where there is one column
    assert np.isnan([values[1], values[3]]).all()
    assert values[::2] == [1, 3, 5]
    assert parse("load,t\n1,0\n\n2,1\n") == ([1, 2], [2, 4])  # and nothing where there are more
    assert parse("flag,t\nTrue,0\nFalse,0\n", "flag")[0] == [1, 0]


def test_dates_become_seconds() -> None:
    day = 86400.0
    iso = "at,load\n1970-01-02,1\n1970-01-03T00:00:00+00:00,2\n"
    with pytest.raises(
        InputError, match=r"line 3 of x.csv, column at: '1970-01-03T00:00:00\+00:00' is not a date"
    ):
        parse(iso, "at", parse_dates=["at"])
    assert parse(iso, "at", parse_dates=["at"], date_format="ISO8601")[0] == [day, 2 * day]
    german = "at;load\n02.01.1970;1\n;2\n04.01.1970;3\n"
    values, _ = parse(german, "at", sep=";", parse_dates=["at"], date_format="%d.%m.%Y")
    assert values[::2] == [day, 3 * day]
    assert np.isnan(values[1])
    assert parse("load,at\n1,1970-01-02 12:00\n", "load", "at", parse_dates=["at"])[0] == [1]
    far = "at,load\n1066-10-14 00:00:30,1\n9999-12-31 00:00:30.25,2\n"  # beyond what nanoseconds hold
    values, _ = parse(far, "at", parse_dates=["at"], date_format="ISO8601")
    moments = [datetime(1066, 10, 14, 0, 0, 30), datetime(9999, 12, 31, 0, 0, 30, 250_000)]
    expected = [(moment - datetime(1970, 1, 1)).total_seconds() for moment in moments]
    assert values == pytest.approx(expected, rel=1e-15)
    for text, words in (
        ("at,load\n13/01/1970,1\n", "column at of x.csv needs a date_format"),
        ("at,load\n01/02/1970,1\n13/02/1970,1\n", "line 3 of x.csv, column at: '13/02/1970' is not a date"),
        ("at,load\nnoon,1\n", "line 2 of x.csv, column at: 'noon' is not a date"),
    ):
        with pytest.raises(InputError, match=words):
            parse(text, "at", parse_dates=["at"])
    with pytest.raises(InputError, match="parse_dates must be among the columns, got at"):
        parse(german, "load", sep=";", parse_dates=["at"])


@pytest.mark.parametrize("name", ["lo\u0301ad (kW)", "l\u00f3ad (kW)", "l\u00f3ad\n (kW) "])
def test_a_column_is_found_however_its_accents_and_blanks_are_written(name: str) -> None:
    for header in ("lo\u0301ad\n(kW)", " l\u00f3ad  (kW)"):
        assert parse(f't,"{header}"\n0,1\n1,2\n', name) == ([1, 2], [2, 3] if "\n" not in header else [3, 4])


@pytest.mark.parametrize(
    ("text", "form", "words"),
    [
        ("load,load\n1,999\n", {}, "x.csv has 2 columns of the name load"),
        ("load,t, load \n1,2,3\n", {}, "x.csv has 2 columns of the name load"),
        ("a;b\n1;2\n", {}, r"no column load; there are a;b \(cells are split by sep = ','\)"),
        ("#\n#\n", {"comment": "#"}, "no column load"),
        ("load,t\n1,2\n2_0,3\n", {}, "line 3 of x.csv, column load: '2_0' is not a number"),
        ("load,t\n1,2\n１2,3\n", {}, "line 3 of x.csv, column load: '１2' is not a number"),
        ("load,t\n1,2\n٣,3\n", {}, "line 3 of x.csv, column load: '٣' is not a number"),
        ("load,t\n1,2\n0x10,3\n", {}, "line 3 of x.csv, column load: '0x10' is not a number"),
        ("load,t\n1,2\n−1,3\n", {}, "line 3 of x.csv, column load: '−1' is not a number"),
        ("load,t\n1,2\n5%,3\n", {}, "line 3 of x.csv, column load: '5%' is not a number"),
        ('load,t\n1,2\n"1,5",3\n', {}, "line 3 .* '1,5' is not a number; decimal, thousands and na_values"),
        ("load;t\n1;2\n1.5;3\n", {"sep": ";", "decimal": ","}, "line 3 of x.csv, column load: '1.5'"),
        ("load,t\n1,2\n\n\nx,3\n", {}, "line 5 of x.csv, column load: 'x'"),
        ('load,t\n1,"one\ntwo\nthree"\nx,2\n', {}, "line 5 of x.csv, column load: 'x'"),
        ('"load\n(kW)",t\n1,2\nx,3\n', {}, "no column load"),
        ("top\n# more\nload,t\n1,2\n# more\nx,3\n", {"skiprows": 1, "comment": "#"}, "line 6 of x.csv"),
        ("load,t\n1,2\n" + "y" * 500 + ",3\n", {}, "^.{,200}$"),
        ("load,t\n1,2\n1,2,3\n", {}, "line 3 of x.csv has more cells than the header's 2 columns"),
        ("load,t\n1,2,3\n1,2,3\n", {}, "line 2 of x.csv has more cells than the header's 2 columns"),
        ("load,t\n1,234.5,3\n", {"thousands": ","}, "line 2 of x.csv has more cells"),
        ("load,t\n1.234,1\n2.5,3\n", {"decimal": "_", "thousands": "."}, r"line 3 .*'2\.5' .*by threes"),
        ('load,t\n"12,34,567.5",1\n"1,23",3\n', {"thousands": ","}, "line 3 .*'1,23' is not .*by threes"),
        ('load,t\n1,2\n1,"oops\n1,2\n1,2\n', {}, "line 3 of x.csv opens a quote that is not closed"),
        ('load,t\n1,2\n1,"oops\n' + "1,2\n" * 60000, {}, "line 3 of x.csv opens a quote"),
        ('load,t\n1,"oops\n1,2\n1,2\n1,"oops\n1,2\n', {}, "line 2 of x.csv opens a quote"),
        ('load,t\n1,"oops\n1,2\n1,2\n1,oops"\n1,2\n', {}, "line 2 .* closed rows later, in line 5"),
        ('load,t\n1,"a" b\n', {}, "line 2 of x.csv opens a quote"),
        ("load,t\n1,2\n3,4\n-inf,2\n", {}, "line 4 of x.csv, column load: -inf is infinite, or too large"),
        ("load,t\n1,2\n3,4\n1e39,2\n", {}, r"line 4 of x.csv, column load: 1e\+39 is infinite, or too large"),
        ("load,t\n1,2\n3,4\n1e400,2\n", {}, "line 4 of x.csv, column load: (inf|'1e400') is"),
        ('load,t,u\n1,5" #,"a\nb"\n', {"comment": "#"}, "it has 2 or 1 rows, by its quotes and comments"),
        ('load,t\n1,2\n"4"#,"#c\n', {"comment": "#"}, "x.csv cannot be read: .*inside string"),
    ],
)
def test_unusable_files_are_named_with_the_line(text: str, form: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        parse(text, **form)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"sep": ""}, "sep must be one ASCII character"),
        ({"sep": None}, "sep must be one ASCII character"),
        ({"decimal": None}, "decimal must be one ASCII character"),
        ({"sep": ";;"}, "sep must be one ASCII character"),
        ({"sep": "§"}, "sep must be one ASCII character"),
        ({"sep": '"'}, "sep must be one ASCII character"),
        ({"decimal": "point"}, "decimal must be one ASCII character"),
        ({"thousands": ""}, "thousands must be one"),
        ({"decimal": ",", "thousands": ","}, "decimal and thousands must differ, got ',' for both"),
        ({"comment": ","}, "comment and sep must differ"),
        ({"skiprows": -1}, "skiprows must be a whole number of at least 0, got -1"),
        ({"parse_dates": True}, "parse_dates must be a list of columns, got True"),
    ],
)
def test_settings_that_cannot_be_are_refused(form: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        SeriesData("x.csv", ["load"], **form)


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [("utf-8", b"\xef\xbb\xbf"), ("utf-16", b""), ("utf-16-le", b"\xff\xfe"), ("cp1252", b"")],
)
def test_encodings_and_byte_order_marks(tmp_path: Path, encoding: str, mark: bytes) -> None:
    path = tmp_path / "x.csv"
    rows = "".join(f"{i / 4},{i}\r\n" for i in range(40))
    path.write_bytes(mark + f"läst,t\r\n{rows}".encode(encoding))
    settings = {"columns": ["läst"], "window": 4, "horizon": 1}
    data = SeriesData(str(path), encoding=encoding, **settings)
    assert data.table[:, 0].tolist() == [i / 4 for i in range(40)]
    if encoding != "utf-8":
        with pytest.raises(InputError, match=r"is not UTF-8 text: byte .* cannot be read; set encoding"):
            SeriesData(str(path), **settings).table  # noqa: B018
    with pytest.raises(InputError, match=r"cannot read .*: unknown encoding: morse"):
        SeriesData(str(path), encoding="morse", **settings).table  # noqa: B018


NOTES = st.sampled_from(["", "x", '"a\nb"', '"one, two\n\nthree"', '"say ""5"""', '"\n"', '" # no"'])
BETWEEN = st.sampled_from(["", "", "", "\n", "  \n", "# c\n", '  # "c\n'])


@given(st.lists(st.tuples(st.floats(-1e30, 1e30), NOTES, BETWEEN), min_size=1, max_size=20))
@settings(deadline=None, max_examples=200)
def test_each_value_and_its_line_are_the_ones_written(rows: list[tuple[float, str, str]]) -> None:
    text, lines = "note,load\n", []
    for value, note, between in rows:
        text += between
        lines.append(text.count("\n") + 1)
        text += f"{note},{value!r}\n"
    values, found = parse(text, comment="#")
    np.testing.assert_allclose(values, [value for value, _, _ in rows], rtol=1e-14)
    assert found == lines
