"""The results on the terminal: a table per class, and the table of classes with its targets."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastrnn.bench.cases import TARGETS, Target
from fastrnn.bench.results import RIVAL, SUBJECT, Record, geometric_mean

NO_TARGET = Target(0, 0)
WIDTH = 130  # where no terminal tells its own


def make_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def make_table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for other in others:
        table.add_column(other, justify="right", no_wrap=True)
    return table


def class_table(group: str, records: list[Record]) -> Table:
    """One row per record of a class; a column per peer, and memory, where they were measured."""
    peers = sorted({name for record in records for name in record.ratios} - {RIVAL})
    memory = any(record.megabytes for record in records)
    columns = ["thr", "torch ms", "fastrnn ms", "torch/fastrnn", "GF/s", "peak"]
    columns += [f"{peer}/fastrnn" for peer in peers]
    columns += ["MB torch", "fastrnn"] if memory else []
    table = make_table(group, "case", *columns, "rounds")
    for record in records:
        cells = [record.case, str(record.threads)]
        cells += [milliseconds(record.ms[name]) for name in (RIVAL, SUBJECT)]
        cells += [ratio_text(record, RIVAL), f"{record.gflops:.1f}", f"{record.peak_share:.0%}"]
        cells += [ratio_text(record, peer) for peer in peers]
        if memory:
            cells += [f"{record.megabytes[name]:.1f}" for name in (RIVAL, SUBJECT)]
        colour = "red" if record.ratios[RIVAL].median < 1 else ""
        table.add_row(*cells, rounds_text(record), style=colour)
    return table


def summary_table(records: list[Record]) -> Table:
    """Per class, other contender and thread count: geometric mean, worst shape, and the target."""
    columns = ("other", "thr", "shapes", "mean", "target", "worst", "target", "worst shape")
    table = make_table("Classes: time of the other / time of fastrnn", "class", *columns)
    found: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        for other in record.ratios:
            found.setdefault((record.group, other, record.threads), []).append(record)
    for (group, other, threads), members in found.items():
        mean = geometric_mean(record.ratios[other].median for record in members)
        worst = min(members, key=lambda record: record.ratios[other].median)
        target = TARGETS.get(group, NO_TARGET) if other == RIVAL else NO_TARGET
        cells = [group, other, str(threads), str(len(members))]
        cells += _judged(mean, target.mean) + _judged(worst.ratios[other].median, target.worst)
        table.add_row(*cells, worst.case)
    return table


def _judged(value: float, target: float) -> list[str]:
    """The value, red under its target, or under 1 where it has none; then the target."""
    colour = "red" if value < (target or 1) else "green"
    return [f"[{colour}]{value:.2f}[/]", f"{target:.2f}" if target else ""]


def ratio_text(record: Record, other: str) -> str:
    if other not in record.ratios:
        return ""
    ratio = record.ratios[other]
    return f"{ratio.median:.2f} {ratio.low:.2f}-{ratio.high:.2f}"


def rounds_text(record: Record) -> str:
    """Rounds that count, and those thrown away; ``!`` where too few were undisturbed."""
    discarded = f" -{record.discarded}" if record.discarded else ""
    return f"{record.rounds}{discarded}{' !' if record.disturbed else ''}"


def milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"
