"""``python -m fastrnn train sweep``: one configuration over a grid of hyper-parameters.

    python -m fastrnn train sweep --config shakespeare --grid model.stack.hidden_size=64,128 \
        --grid model.optim.lr=0.002,0.004 --trainer.max_steps 200

Every combination is a run of its own, in this process. The table is written to ``runs/<name>-sweep.csv``
after each run (``<name>-sweep-1.csv`` where an earlier sweep has left one), sorted by the metric that the
configuration's best checkpoint watches. A combination that cannot be run comes last, with the reason.
"""

import argparse
import csv
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastrnn.training.errors import InputError, in_short
from fastrnn.training.run import folder_of_runs, rows_of

Row = dict[str, str | float]
Trial = dict[str, str]  # hyper-parameter -> value


def main(argv: list[str]) -> int:
    """Run the grid; arguments that are not the sweep's own go to every run."""
    parser = argparse.ArgumentParser(prog="python -m fastrnn train sweep", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--grid", action="append", required=True, metavar="KEY=A,B,...")
    own, shared = parser.parse_known_args(argv)
    grid = axes(own.grid)
    trials = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    path = new_table(shared, trials)
    rows: list[Row] = []
    try:
        for trial in trials:
            rows.append({**trial, **one_run(shared, trial)})
            rows.sort(key=lambda row: (bool(row["failed"]), row["sorted by"]))
            write(path, rows)
    finally:
        if not rows:
            path.unlink()
    show(rows)
    print(f"table: {path.resolve()}")
    if rows[0]["failed"]:
        raise InputError(f"no combination gave a result: {rows[0]['failed']}")
    return 0


def axes(texts: Iterable[str]) -> dict[str, list[str]]:
    """The values of each hyper-parameter.

    Raises:
        InputError: a value is missing, or a hyper-parameter given twice.
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        found = list(split(values))
        if not key or not all(found):
            raise InputError(f"--grid must be KEY=A,B,..., got {text!r}")
        if key in grid:
            raise InputError(f"--grid must name each hyper-parameter once, got {key} twice")
        grid[key] = found
    return grid


def split(values: str) -> Iterator[str]:
    """The parts between commas; a comma inside brackets, braces or quotation marks parts nothing."""
    depth, start, quote = 0, 0, ""
    for i, c in enumerate(values):
        if quote or c in "\"'":
            quote = "" if c == quote else quote or c
        elif c == "," and not depth:
            yield values[start:i].strip()
            start = i + 1
        else:
            depth += (c in "[{(") - (c in "]})")
    yield values[start:].strip()


def arguments(shared: list[str], trial: Trial) -> list[str]:
    from fastrnn.training.cli import with_shipped_configs

    return with_shipped_configs(["fit", *shared, *(f"--{k}={v}" for k, v in trial.items())])


def new_table(shared: list[str], trials: list[Trial]) -> Path:
    """An empty file for the table, by a name that no other sweep has.

    Raises:
        InputError: the parser takes no combination, or the file cannot be made.
    """
    config = first_config(shared, trials)
    folder = folder_of_runs(config.runs, config.name)
    for number in itertools.count():
        path = Path(f"{folder}-sweep{f'-{number}' if number else ''}.csv")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)
            break
        except FileExistsError as error:
            if not path.parent.is_dir():
                raise InputError(f"cannot write {path}: {path.parent} is no folder") from error
        except (OSError, ValueError) as error:  # ValueError: a null character
            raise InputError(f"cannot write {path}: {error}") from error
    return path


def first_config(shared: list[str], trials: list[Trial]) -> Any:
    """The settings of the first combination that the parser takes."""
    from fastrnn.training.cli import Parsed, run

    for trial in trials:
        try:
            return run(arguments(shared, trial), Parsed).config.fit
        except InputError as error:
            refused = error
    raise refused


def one_run(shared: list[str], trial: Trial) -> Row:
    """Fit with these values: the best validation metric, speed, where the run lies; or why it failed."""
    from fastrnn.training.arguments import refused, root
    from fastrnn.training.cli import run

    try:
        cli = run(arguments(shared, trial))
    except Exception as error:  # whatever it is, the other combinations are run
        reason = refused(error) or in_short(root(error))
        return {"failed": reason, "sorted by": math.inf}
    speeds = [r["speed/tokens_per_s"] for r in rows_of(cli.trainer) if "speed/tokens_per_s" in r]
    found: Row = {"tokens/s": round(speeds[-1]) if speeds else 0, "run": str(cli.trainer.log_dir)}
    if cli.best is None or cli.best.best_model_score is None:
        return {**found, "failed": "validation chose no checkpoint", "sorted by": math.inf}
    score = float(cli.best.best_model_score)
    rank = (score if cli.best.mode == "min" else -score) if math.isfinite(score) else math.inf
    return {str(cli.best.monitor): score, **found, "failed": "", "sorted by": rank}


def columns(rows: list[Row]) -> list[str]:
    """The keys of all rows: hyper-parameters and results in the order of the fullest, why it failed last."""
    keys = dict.fromkeys(key for row in sorted(rows, key=len, reverse=True) for key in row)
    return [key for key in keys if key not in ("failed", "sorted by")] + ["failed", "sorted by"]


def write(path: Path, rows: list[Row]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def show(rows: list[Row]) -> None:
    table = Table(title="Sweep, best first")
    keys = columns(rows)[:-1] if any(row["failed"] for row in rows) else columns(rows)[:-2]
    for key in keys:
        table.add_column(escape(key), overflow="fold")
    for row in rows:
        values = [row.get(key, "") for key in keys]
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else escape(str(v)) for v in values))
    Console().print(table)
