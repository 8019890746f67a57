"""Columns of a CSV file as numbers: pandas reads the cells, Python's csv module finds their lines."""

import csv
import io
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import NamedTuple

import numpy as np
import pandas as pd

from fastrnn.training.errors import InputError, check_whole, listing

BLANKS = r"\s+"  # pandas' name for a separator of any number of blanks
NUMBER = re.compile(r"[-+]?\d[\d.,]*([eE][-+]?\d+)?", re.ASCII)


class Record(NamedTuple):
    """A row of a CSV text, or a blank line."""

    first: int  # its lines in the text
    last: int
    cells: list[str]
    blank: bool


@dataclass(frozen=True)
class CsvFormat:
    r"""How a CSV file is written, by the names that ``pandas.read_csv`` has for it.

    Args:
        sep: between cells: one character, ``\t`` for a tab, or ``\s+`` for any run of blanks.
        decimal: before the digits of a fraction.
        thousands: between groups of digits; None for nothing.
        encoding: of the file's characters.
        na_values: what stands for a missing value, beside nothing, NA, NaN, null and the like.
        skipinitialspace: blanks after a separator do not count.
        skiprows: lines above the header, such as Excel's ``sep=;``.
        comment: this character and the rest of its line do not count; None for no such character.
        parse_dates: those of the columns that hold dates, or one; they become seconds since 1970, in UTC.
        date_format: of these dates, such as ``%d.%m.%Y``; guessed from the first when left out.

    Raises:
        InputError: settings that cannot be, or that contradict each other.
    """

    sep: str = ","
    decimal: str = "."
    thousands: str | None = None
    encoding: str = "utf-8"
    na_values: str | float | list[str | float] | None = None
    skipinitialspace: bool = True
    skiprows: int = 0
    comment: str | None = None
    parse_dates: list[str] | str | None = None
    date_format: str | None = None

    def __post_init__(self) -> None:
        if self.sep == r"\t":  # as a shell hands it over
            object.__setattr__(self, "sep", "\t")
        marks = {"sep": self.sep, "decimal": self.decimal}
        marks |= {"thousands": self.thousands} if self.thousands is not None else {}
        marks |= {"comment": self.comment} if self.comment is not None else {}
        for name, mark in marks.items():
            single = isinstance(mark, str) and len(mark) == 1 and mark not in '"\r\n'
            fits = single and (mark.isascii() or name == "thousands")
            if not fits and (name, mark) != ("sep", BLANKS):
                raise InputError(f"{name} must be one ASCII character, and no quote, got {mark!r}")
        for one, other in (("decimal", "thousands"), ("comment", "sep"), ("comment", "decimal")):
            if getattr(self, one) is not None and getattr(self, one) == getattr(self, other):
                raise InputError(f"{one} and {other} must differ, got {getattr(self, one)!r} for both")
        check_whole("skiprows", self.skiprows, 0)
        if isinstance(self.parse_dates, str):
            object.__setattr__(self, "parse_dates", [self.parse_dates])
        if not isinstance(self.parse_dates, (Sequence, NoneType)):
            raise InputError(f"parse_dates must be a list of columns, got {self.parse_dates!r}")


@dataclass(frozen=True)
class Table:
    """Values [N, I] of the named columns, NaN where there is none, and the line that each row begins in."""

    values: np.ndarray
    columns: list[str]
    lines: list[int]


def parse_csv(text: str, columns: list[str] | None, form: CsvFormat, name: str) -> Table:
    """Columns of a CSV text with a header; True and False are 1 and 0.

    A blank line is a missing value in a file of one column, and nothing in others and at the end.

    Raises:
        InputError: no such column, or two of that name, no rows, rows longer than the header, quotes
            that are not closed, a cell that is no number, or one that float32 does not hold.
    """
    if form.thousands and not form.thousands.isascii():  # pandas knows only ASCII here
        text, form = text.replace(form.thousands, ""), replace(form, thousands=None)
    if form.comment:  # of a comment after blanks pandas makes a row
        text = re.sub(rf"(?m)^[ \t]+(?={re.escape(form.comment)})", "", text)
    sheet = Sheet(text.rstrip(), columns, form, name)
    values = sheet.values()
    with np.errstate(over="ignore"):
        beyond = np.isinf(values.astype(np.float32))
    for row, i in np.argwhere(beyond)[:1]:
        where, value = sheet.where(row, sheet.columns[i]), values[row, i]
        raise InputError(f"{where}: {value:g} is infinite, or too large for float32")
    return Table(values, sheet.columns, sheet.lines)


class Sheet:
    """A CSV text of which the header and the line of each row are known."""

    def __init__(self, text: str, columns: list[str] | None, form: CsvFormat, name: str) -> None:
        self.text, self.form, self.name = text, form, name
        rows = records(text, form, name)
        header = next((row for row in rows if not row.blank), Record(1, 1, [], True))
        self.start, self.width = header.first, len(header.cells)
        self.columns = columns or []
        self.places = find(columns, header.cells, form, name)
        self.lines = [row.first for row in rows if self._counts(row)]
        if not self.lines:
            raise InputError(f"{name} has a header but no rows")

    def _counts(self, row: Record) -> bool:
        if len(row.cells) > self.width and any(cell.strip() for cell in row.cells[self.width :]):
            raise InputError(
                f"line {row.first} of {self.name} has more cells than the header's {self.width} columns; a "
                "separator inside of a cell needs quotes around it"
            )
        if row.last > row.first and any(
            self._looks_like_a_row(line) for cell in row.cells for line in cell.split("\n")[1:]
        ):
            raise InputError(
                f"line {row.first} of {self.name} opens a quote that is closed rows later, in line {row.last}"
            )
        return self.width == 1 or not row.blank

    def _looks_like_a_row(self, line: str) -> bool:
        cells = line.split() if self.form.sep == BLANKS else line.split(self.form.sep)
        return len(cells) == self.width > 1 and all(NUMBER.fullmatch(cells[p].strip()) for p in self.places)

    def where(self, row: int, column: str) -> str:
        return f"line {self.lines[row]} of {self.name}, column {listing([column])}"

    def values(self) -> np.ndarray:
        """Values [N, I] of the columns; NaN for what is missing."""
        dates = [c for c in self.columns if c in (self.form.parse_dates or [])]
        if self.form.thousands:
            self._check_groups([c for c in self.columns if c not in dates])
        try:
            frame = self._read({c: str if c in dates else float for c in self.columns})
        except ValueError as error:
            self._refuse_text([c for c in self.columns if c not in dates])
            raise self._unreadable(error) from None
        for column in dates:
            cells = frame[column].dropna()
            found = seconds(cells, self.form.date_format, f"column {column} of {self.name}")
            self._refuse(cells[found.isna()], column, "a date; date_format says how one is written")
            frame[column] = found.reindex(frame.index)
        return frame[self.columns].to_numpy(float)

    def _read(self, kinds: dict[str, type]) -> pd.DataFrame:
        file, form = io.StringIO(self.text), self.form
        for _ in range(self.start - 1):
            file.readline()
        frame = pd.read_csv(
            file,
            header=0,
            names=list(range(self.width)),
            index_col=False,
            usecols=self.places,
            dtype={p: kinds[c] for p, c in zip(self.places, self.columns, strict=True)},
            skip_blank_lines=self.width > 1,
            sep=form.sep,
            decimal=form.decimal,
            thousands=form.thousands,
            na_values=form.na_values,  # type: ignore[arg-type]  # the stubs know text alone
            skipinitialspace=form.skipinitialspace,
            comment=form.comment,
        )
        if len(frame) != len(self.lines):
            raise ValueError(f"it has {len(frame)} or {len(self.lines)} rows, by its quotes and comments")
        return frame.rename(columns=dict(zip(self.places, self.columns, strict=True)))

    def _unreadable(self, error: ValueError) -> InputError:
        return InputError(f"{self.name} cannot be read: {' '.join(str(error).split())}")

    def _texts(self) -> pd.DataFrame:
        try:
            return self._read(dict.fromkeys(self.columns, str))
        except ValueError as error:
            raise self._unreadable(error) from None

    def _check_groups(self, columns: list[str]) -> None:
        """Refuse digits that do not stand in groups of three, or two before (1,23,456): pandas takes 2.5 for
        25 where thousands is a dot."""
        frame, mark = self._texts(), str(self.form.thousands)
        of, decimal = re.escape(mark), re.escape(self.form.decimal)
        number = rf"\s*[-+]?\d{{1,3}}({of}\d{{2,3}})*{of}\d{{3}}({decimal}\d*)?([eE][-+]?\d+)?\s*"
        for column in columns:
            cells = frame[column].dropna()
            cells = cells[cells.str.contains(mark, regex=False)]
            words = f"a number of which thousands = {mark!r} parts the digits by threes"
            self._refuse(cells[~cells.str.fullmatch(number)], column, words)

    def _refuse_text(self, columns: list[str]) -> None:
        """Names the first cell that is no number."""
        frame = self._texts()
        signs = {ord("."): "?", ord(self.form.decimal): "."}
        signs |= {ord(self.form.thousands): ""} if self.form.thousands else {}
        for column in columns:
            cells = frame[column].dropna()
            numbers = pd.to_numeric(cells.map(lambda cell: cell.translate(signs)), errors="coerce")
            words = "a number; decimal, thousands and na_values say how one is written"
            self._refuse(cells[numbers.isna()], column, words)

    def _refuse(self, cells: pd.Series, column: str, words: str) -> None:
        if len(cells):
            shown = textwrap.shorten(repr(cells.iloc[0]), 60, placeholder=" ...")
            raise InputError(f"{self.where(int(cells.index[0]), column)}: {shown} is not {words}")


def records(text: str, form: CsvFormat, name: str) -> Iterator[Record]:
    """The records of a CSV text, blank lines among them; comments and ``skiprows`` are left out."""
    first, last, line = 0, 0, ""
    sep, comment = " " if form.sep == BLANKS else form.sep, form.comment or ""

    def counted() -> Iterator[str]:
        nonlocal first, last, line
        for last, line in enumerate(io.StringIO(text), 1):
            if last <= form.skiprows:
                continue
            at = line.find(comment) if comment else -1
            while at >= 0 and (line[:at].count('"') + (first > 0)) % 2:  # it stands in a quoted cell
                at = line.find(comment, at + 1)
            if at == 0:
                continue
            line = line if at < 0 else line[:at] + "\n"
            first = first or last
            if form.sep == BLANKS:
                line = " ".join(line.split()) + "\n"
            elif '" ' in line and sep != " ":
                line = re.sub(rf'" +(?={re.escape(sep)}|$)', '"', line)
            yield line

    reader = csv.reader(counted(), delimiter=sep, skipinitialspace=form.skipinitialspace, strict=True)
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a cell may be as long as the text
    try:
        for cells in reader:
            yield Record(first, last, cells, blank=first == last and not line.strip() and sep not in line)
            first = 0
    except csv.Error as error:
        raise InputError(
            f"line {first} of {name} opens a quote that is not closed as it should be: {error}"
        ) from None


def find(columns: list[str] | None, found: list[str], form: CsvFormat, name: str) -> list[int]:
    """The places of the columns in the header."""
    found = [plain(cell) for cell in found]
    there = f"there are {listing(filter(None, found)) or 'none'}"
    if len(found) == 1:
        there += f" (cells are split by sep = {form.sep!r})"
    if not columns:
        raise InputError(f"name the columns of {name} to use, as --data.columns '[a, b]'; {there}")
    wanted = [plain(c) for c in columns]
    if absent := [c for c, w in zip(columns, wanted, strict=True) if w not in found]:
        raise InputError(f"{name} has no column {listing(absent)}; {there}")
    if double := [c for c in wanted if found.count(c) > 1]:
        raise InputError(f"{name} has {found.count(double[0])} columns of the name {listing(double[:1])}")
    if strange := sorted({*(form.parse_dates or [])} - {*columns}):
        raise InputError(f"parse_dates must be among the columns, got {listing(strange)}")
    return [found.index(w) for w in wanted]


def plain(name: str) -> str:
    """A column's name as it is compared: accents composed, every run of blanks and line breaks one blank."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def seconds(cells: pd.Series, date_format: str | None, what: str) -> pd.Series:
    """Dates as seconds since 1970, UTC; NaN for what is none."""
    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always")
        try:
            times = pd.to_datetime(cells, errors="coerce", utc=True, format=date_format)
        except ValueError as error:
            raise InputError(f"{what} needs another date_format: {error}") from None
    if doubts:  # each cell on its own: the order of day and month may change
        raise InputError(f"{what} needs a date_format: {doubts[0].message}")
    since = times.dt.tz_localize(None).to_numpy() - np.datetime64(0, "s")  # in the dates' own unit
    return pd.Series(since / np.timedelta64(1, "s"), times.index)
