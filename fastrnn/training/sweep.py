"""``python -m fastrnn train sweep``: one configuration over a grid of hyper-parameters.

    python -m fastrnn train sweep --config shakespeare --grid model.stack.hidden_size=64,128 \
        --grid model.optim.lr=0.002,0.004 --trainer.max_steps 200

Every combination is a run of its own, in this process; the table is sorted by the metric that the
configuration's best checkpoint watches, and is written to ``runs/<name>-sweep.csv`` after each run.
"""

import argparse
import csv
import itertools
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastrnn.training.errors import InputError

Row = dict[str, str | float]


def main(argv: list[str]) -> int:
    """Run the grid; arguments that are not the sweep's own go to every run."""
    parser = argparse.ArgumentParser(prog="python -m fastrnn train sweep", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--grid", action="append", required=True, metavar="KEY=A,B,...")
    own, shared = parser.parse_known_args(argv)
    grid = dict(axis(text) for text in own.grid)
    rows: list[Row] = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        rows.append({**chosen, **one_run(shared, chosen)})
        rows.sort(key=lambda row: float(row["sorted by"]))
        path = write(rows)
    show(rows)
    print(f"table: {path.resolve()}")
    return 0


def axis(text: str) -> tuple[str, list[str]]:
    key, _, values = text.partition("=")
    if not values:
        raise InputError(f"--grid must be KEY=A,B,..., got {text!r}")
    return key, values.split(",")


def one_run(shared: list[str], chosen: dict[str, str]) -> Row:
    """Fit with these values: the best validation metric, speed, and where the run lies."""
    from fastrnn.training.cli import run, with_shipped_configs

    cli = run(with_shipped_configs(["fit", *shared, *(f"--{k}={v}" for k, v in chosen.items())]))
    best = cli.trainer.checkpoint_callback
    score = float(best.best_model_score)
    rates = [r["speed/tokens_per_s"] for r in cli.trainer.logger.rows if "speed/tokens_per_s" in r]
    return {
        str(best.monitor): score,
        "tokens/s": round(rates[-1]) if rates else 0,
        "run": str(cli.trainer.log_dir),
        "sorted by": score if best.mode == "min" else -score,
    }


def write(rows: list[Row]) -> Path:
    run = Path(str(rows[0]["run"]))
    path = run.parent.with_name(f"{run.parent.name}-sweep.csv")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def show(rows: list[Row]) -> None:
    table = Table(title="Sweep, best first")
    keys = [key for key in rows[0] if key != "sorted by"]
    for key in keys:
        table.add_column(escape(key), overflow="fold")
    for row in rows:
        cells = (f"{row[k]:.4g}" if isinstance(row[k], float) else str(row[k]) for k in keys)
        table.add_row(*map(escape, cells))
    Console().print(table)
