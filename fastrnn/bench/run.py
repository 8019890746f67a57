"""The measuring command: choose cases, measure them class by class, show, save and plot."""

import argparse
import warnings
from fnmatch import fnmatch
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastrnn.bench.cases import CASES, INFER, TRAIN, Case, smallest_of_each_class
from fastrnn.bench.neighbours import busy_neighbours
from fastrnn.bench.peak import Peak, measure_peak
from fastrnn.bench.plots import plot_ratios
from fastrnn.bench.results import Record, Results, describe_environment
from fastrnn.bench.runner import PEERS, measure_case
from fastrnn.bench.tables import class_table, make_console, summary_table
from fastrnn.bench.workload import NO_PROJECTION, Disagreement


def parser() -> argparse.ArgumentParser:
    default = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("python -m fastrnn bench", formatter_class=default)
    add = parser.add_argument
    add("--threads", type=int, nargs="+", default=[torch.get_num_threads()], metavar="N")
    add("--mode", nargs="+", choices=[TRAIN, INFER], default=[TRAIN, INFER])
    add("--cases", nargs="+", default=["*"], metavar="GLOB", help="names, as in the table")
    add("--class", nargs="+", default=["*"], dest="groups", metavar="NAME", help="or a glob of it")
    add("--seconds", type=float, default=2.0, help="for a case, at least; large ones take longer")
    add("--quick", action="store_true", help="the smallest case of each class, a smoke test")
    add(
        "--peers",
        nargs="+",
        choices=list(PEERS),
        default=[],
        help="also time these, inference only",
    )
    add(
        "--prepack",
        nargs="?",
        const=True,
        default=False,
        choices=["bfloat16", "int8"],
        help="inference after fastrnn.prepack(), or with rounded weights",
    )
    add("--busy", type=int, default=0, metavar="N", help="beside N busy processes; no round is discarded")
    add("--memory", action="store_true", help="also the peak memory of a training step")
    add("--list", action="store_true", help="name the chosen cases and stop")
    add("--json", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="FILE")
    return parser


def run(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    console = make_console()
    chosen = choose(options)
    missing = [name for name in options.peers if not (find_spec(name) and find_spec("onnx"))]
    if not chosen or missing:
        reason = f"not installed: {', '.join(missing)}, onnx" if missing else "no case has that name"
        console.print(f"fastrnn: {reason}", style="red")
        return 2
    if options.list:
        console.print("\n".join(f"{case.name:32}{case.class_of(mode)}" for case, mode in chosen))
        return 0
    warnings.filterwarnings("ignore", message=NO_PROJECTION)
    peaks = {threads: _peak(threads) for threads in options.threads}
    environment = describe_environment(peaks) | {"prepacked": options.prepack, "busy": options.busy}
    _show_environment(console, environment, peaks)
    records: list[Record] = []
    failures: list[str] = []
    try:
        with busy_neighbours(options.busy):
            _measure(console, chosen, options, peaks, records, failures)
    except KeyboardInterrupt:
        failures.append("interrupted")
    finally:  # what was measured before an error is kept
        _report(console, Results(environment, records), options)
    for failure in failures:
        console.print(f"FAILED {failure}", style="bold red")
    return 1 if failures else 0


def _report(console: Console, results: Results, options: argparse.Namespace) -> None:
    if not results.records:
        return
    console.print(summary_table(results.records))
    if options.json:
        results.save(options.json)
    if options.plot:
        plot_ratios(results, options.plot)


def choose(options: argparse.Namespace) -> list[tuple[Case, str]]:
    """The chosen cases with their modes, class by class in the order of the case table."""
    cases = smallest_of_each_class(CASES) if options.quick else CASES
    pairs = [
        (case, mode)
        for case in cases
        for mode in case.modes
        if mode in options.mode
        and _matches(case.name, options.cases)
        and _matches(case.class_of(mode), options.groups)
    ]
    order = list(dict.fromkeys(case.class_of(mode) for case, mode in pairs))
    return sorted(pairs, key=lambda pair: order.index(pair[0].class_of(pair[1])))


def _matches(name: str, globs: list[str]) -> bool:
    return any(fnmatch(name.lower(), glob.lower()) for glob in globs)


def _peak(threads: int) -> Peak:
    torch.set_num_threads(threads)
    return measure_peak(threads)


def _measure(
    console: Console,
    chosen: list[tuple[Case, str]],
    options: argparse.Namespace,
    peaks: dict[int, Peak],
    records: list[Record],
    failures: list[str],
) -> None:
    """Append to ``records`` and ``failures`` case by case; a table appears after each class."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen) * len(options.threads))
        for group, pairs in groupby(chosen, key=lambda pair: pair[0].class_of(pair[1])):
            start = len(records)
            for case, mode in pairs:
                for threads in options.threads:
                    progress.update(task, description=f"{case.name} {mode}, {threads} threads")
                    try:
                        record = measure_case(
                            case, mode, threads, peaks[threads],
                            options.seconds, options.peers, options.memory, options.prepack,
                            (lambda: 0.0) if options.busy else None,
                        )  # fmt: skip
                        records.append(record)
                    except Disagreement as failure:
                        failures.append(str(failure))
                        console.print(f"FAILED {failure}", style="bold red")
                    progress.advance(task)
            if records[start:]:
                console.print(class_table(group, records[start:]))


def _show_environment(console: Console, environment: dict[str, object], peaks: dict[int, Peak]) -> None:
    console.print(
        f"{environment['cpu']}, kernels {environment['kernels']}, torch {environment['torch']} "
        f"({environment['capability']}), load {environment['load']}"
        + ", prepacked" * bool(environment["prepacked"])
        + f" as {environment['prepacked']}" * isinstance(environment["prepacked"], str)
        + f", {environment['busy']} busy neighbours" * bool(environment["busy"])
    )
    if environment["variables"]:
        console.print(f"under {environment['variables']}", markup=False)
    for threads, peak in peaks.items():
        console.print(f"FMA peak, {threads} threads: {peak.gflops:.0f} GF/s ({peak.source})")
