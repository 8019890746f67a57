"""The results as pictures: bars of ratios, and curves of time against T and against B."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from fastrnn.bench.results import RIVAL, SUBJECT, Record, Results


def plot_ratios(results: Results, path: Path) -> None:
    """A bar per record, from 1 (torch's time) to the median ratio; the quartiles as whiskers."""
    records = results.records[::-1]  # bars are drawn from the bottom up
    groups = list(dict.fromkeys(record.group for record in results.records))
    ratios = [record.ratios[RIVAL] for record in records]
    figure = Figure(figsize=(9, 1.4 + 0.22 * len(records)), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        [_label(record) for record in records],
        [ratio.median - 1 for ratio in ratios],
        left=1,
        color=[f"C{groups.index(record.group) % 10}" for record in records],
        xerr=[
            [ratio.median - ratio.low for ratio in ratios],
            [ratio.high - ratio.median for ratio in ratios],
        ],
        error_kw={"elinewidth": 0.8},
    )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.01)
    axes.set_xlabel("torch time / fastrnn time (in brackets: threads, ! disturbed; whiskers: quartiles)")
    machine = results.environment.get("device") or results.environment["cpu"]
    axes.set_title(f"{machine}\ntorch {results.environment['torch']}")
    _save(figure, path)


def _label(record: Record) -> str:
    notes = f"{record.threads or ''}{'!' if record.disturbed else ''}"  # on a device there are no threads
    return f"{record.case} {record.mode}" + (f" ({notes})" if notes else "")


def plot_curves(curves: dict[str, dict[int, Record]], path: Path) -> None:
    """Time per step against the number of steps: ``curves[title][T or B]``; flat is linear."""
    figure = Figure(figsize=(5 * len(curves), 4), layout="constrained")
    for axes, (title, points) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        for name in (RIVAL, SUBJECT):
            per_unit = [1e3 * record.ms[name] / size for size, record in points.items()]
            axes.loglog(list(points), per_unit, marker="o", label=name)
        axes.set_title(title)
        axes.set_xlabel(title.rsplit(" ", 1)[-1])
        axes.set_ylabel("us per unit (flat: linear)")
        axes.legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
