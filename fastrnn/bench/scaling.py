"""Time against T and against B: a step's cost must not depend on how many there are."""

import argparse
from pathlib import Path

import torch
from rich.progress import track
from rich.table import Table

from fastrnn.bench.cases import INFER, TRAIN, Case
from fastrnn.bench.peak import measure_peak
from fastrnn.bench.plots import plot_curves
from fastrnn.bench.results import RIVAL, SUBJECT, Record, Results, describe_environment
from fastrnn.bench.runner import measure_case
from fastrnn.bench.tables import make_console, make_table, milliseconds, ratio_text, rounds_text

STEPS = (10, 100, 1_000, 10_000, 100_000)  # T, at B=1 and H=64
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # B, at T=50 and H=128


def scaling(argv: list[str]) -> int:
    default = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("python -m fastrnn bench scaling", formatter_class=default)
    parser.add_argument("--cell", choices=["LSTM", "GRU", "RNN"], default="LSTM")
    parser.add_argument("--mode", choices=[TRAIN, INFER], default=TRAIN)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--seconds", type=float, default=1.0, help="for a point, at least")
    parser.add_argument("--longest", type=int, default=STEPS[-1], help="leave out T and B above this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    console = make_console()
    torch.set_num_threads(options.threads)
    peak = measure_peak(options.threads)
    environment = describe_environment({options.threads: peak})
    cell, longest = options.cell, options.longest
    cases = {
        f"{cell} {options.mode}, B=1, H=64, over T": {
            T: Case(cell, T, 1, 64, 64) for T in STEPS if longest >= T
        },
        f"{cell} {options.mode}, T=50, H=128, over B": {
            B: Case(cell, 50, B, 128, 128) for B in ROWS if longest >= B
        },
    }
    curves: dict[str, dict[int, Record]] = {}
    for title, points in cases.items():
        curves[title] = {
            size: measure_case(case, options.mode, options.threads, peak, options.seconds)
            for size, case in track(points.items(), title, console=console, transient=True)
        }
        console.print(_table(title, curves[title]))
    if options.json:
        records = [record for points in curves.values() for record in points.values()]
        Results(environment, records).save(options.json)
    if options.plot:
        plot_curves(curves, options.plot)
    return 0


def _table(title: str, points: dict[int, Record]) -> Table:
    size_name = title[-1]
    per_unit = [f"{name} us / {size_name}" for name in (RIVAL, SUBJECT)]
    columns = ("torch ms", "fastrnn ms", *per_unit, "torch / fastrnn", "rounds")
    table = make_table(title, size_name, *columns)
    for size, record in points.items():
        times = [record.ms[name] for name in (RIVAL, SUBJECT)]
        texts = [milliseconds(time) for time in times]
        texts += [f"{1e3 * time / size:.2f}" for time in times]
        table.add_row(f"{size:,}", *texts, ratio_text(record, RIVAL), rounds_text(record))
    return table
