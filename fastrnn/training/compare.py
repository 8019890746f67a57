"""``python -m fastrnn train compare RUN RUN ...``: runs side by side, as a table and one picture.

A run is its folder, such as ``runs/shakespeare/version_0``; the picture goes to ``--out``.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastrnn.training import plots
from fastrnn.training.errors import InputError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastrnn train compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--metric", default="loss", help="of train/ and val/; default: loss")
    parser.add_argument("--out", type=Path, default=Path("compare.png"))
    own = parser.parse_args(argv)
    runs = {str(folder): read_rows(folder) for folder in own.runs}
    Console().print(side_by_side(runs, own.metric))
    for sentence in in_words(runs, own.metric):
        print(sentence)
    plots.overlay(runs, own.metric).savefig(own.out, dpi=110)
    print(f"picture: {own.out.resolve()}")
    return 0


def read_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's ``metrics.csv``.

    Raises:
        InputError: there is none.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        raise InputError(f"{folder} is no folder of a run: it has no metrics.csv")
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def side_by_side(runs: dict[str, list[dict[str, float]]], metric: str) -> Table:
    """Last values of each run; training time is also given relative to the first run's."""
    table = Table(title=f"{metric}, last values")
    for column in ("run", "step", "training", "validation", "tokens/s", "seconds", "time"):
        table.add_column(column)
    first = None
    for name, rows in runs.items():
        seconds = last(rows, "speed/seconds")
        first = first or seconds
        cells = [max(r["step"] for r in rows), *(last(rows, f"{p}/{metric}") for p in ("train", "val"))]
        cells += [last(rows, "speed/tokens_per_s"), seconds]
        shown = (f"{c:,.0f}" if c > 100 else f"{c:.4g}" for c in cells)
        table.add_row(name, *shown, f"{seconds / first:.2f}x")
    return table


def in_words(runs: dict[str, list[dict[str, float]]], metric: str) -> Iterator[str]:
    """Of each further run: how far its curve is from the first one's, and how much longer it took."""
    (first, base), *others = runs.items()
    for name, rows in others:
        time = last(rows, "speed/seconds") / last(base, "speed/seconds")
        known = dict(zip(*plots.series(base, f"train/{metric}"), strict=True))
        gaps = [
            abs(v - known[s])
            for s, v in zip(*plots.series(rows, f"train/{metric}"), strict=True)
            if s in known
        ]
        apart = f"its train/{metric} is {sum(gaps) / len(gaps):.3g} away on average; " if gaps else ""
        yield f"{name} beside {first}: {apart}it took {time:.2f} times as long"


def last(rows: list[dict[str, float]], key: str) -> float:
    _, values = plots.series(rows, key)
    return values[-1] if values else float("nan")
