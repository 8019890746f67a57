"""``python -m fastrnn train compare RUN RUN ...``: runs side by side, as a table and one picture.

A run is its folder, such as ``runs/shakespeare/version_0``; the picture goes to ``--out``.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastrnn.training import plots
from fastrnn.training.errors import InputError, listing


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastrnn train compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--metric", default="loss", help="of train/ and val/; default: loss")
    parser.add_argument("--out", type=Path, default=Path("compare.png"))
    own = parser.parse_args(argv)
    runs = {str(folder): read_rows(folder) for folder in own.runs}
    keys = (key.partition("/") for rows in runs.values() for row in rows for key in row)
    known = {metric for part, _, metric in keys if part in ("train", "val")}
    if own.metric not in known:
        raise InputError(f"no run has a metric {own.metric}; there are {listing(sorted(known))}")
    Console().print(side_by_side(runs, own.metric))
    for sentence in in_words(runs, own.metric):
        print(sentence)
    try:
        with matplotlib.rc_context({"text.usetex": False}):  # names are no LaTeX
            plots.overlay(runs, own.metric).savefig(own.out, format=own.out.suffix[1:] or "png", dpi=110)
    except (OSError, ValueError) as error:  # no such folder, no such format
        raise InputError(f"cannot write {own.out}: {error}") from None
    print(f"picture: {own.out.resolve()}")
    return 0


def read_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's ``metrics.csv``.

    Raises:
        InputError: there is none, or it has no rows or cells that are not numbers.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        raise InputError(f"{folder} is no folder of a run: it has no metrics.csv")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    except (csv.Error, TypeError, ValueError) as error:  # cut off, or another program's
        raise InputError(f"{path} is not the log of a run: {error}") from None
    if not (rows := [row for row in rows if "step" in row]):
        raise InputError(f"{path} has no rows: that run has logged nothing")
    return rows


def side_by_side(runs: dict[str, list[dict[str, float]]], metric: str) -> Table:
    """Last values of each run; training time is also given relative to the first run's."""
    table = Table(title=f"{escape(metric)}, last values")
    table.add_column("run", overflow="fold")
    for column in ("step", "training", "validation", "tokens/s", "seconds", "time"):
        table.add_column(column, no_wrap=True)
    first = last(next(iter(runs.values())), "speed/seconds")
    for name, rows in runs.items():
        seconds = last(rows, "speed/seconds")
        cells = [max(r["step"] for r in rows), *(last(rows, f"{p}/{metric}") for p in ("train", "val"))]
        cells += [last(rows, "speed/tokens_per_s"), seconds]
        shown = (f"{c:,.0f}" if c > 100 else f"{c:.4g}" for c in cells)
        table.add_row(escape(name), *shown, f"{times(seconds, first)}x")
    return table


def in_words(runs: dict[str, list[dict[str, float]]], metric: str) -> Iterator[str]:
    """A line for each further run: the distance of its curve from the first run's, and its relative time."""
    (first, base), *others = runs.items()
    for name, rows in others:
        time = times(last(rows, "speed/seconds"), last(base, "speed/seconds"))
        known = dict(zip(*plots.series(base, f"train/{metric}"), strict=True))
        gaps = [
            abs(v - known[s])
            for s, v in zip(*plots.series(rows, f"train/{metric}"), strict=True)
            if s in known
        ]
        apart = f"its train/{metric} is {sum(gaps) / len(gaps):.3g} away on average; " if gaps else ""
        yield f"{name} beside {first}: {apart}it took {time} times as long"


def times(seconds: float, first: float) -> str:
    return f"{seconds / first if first else float('nan'):.2f}"


def last(rows: list[dict[str, float]], key: str) -> float:
    _, values = plots.series(rows, key)
    return values[-1] if values else float("nan")
