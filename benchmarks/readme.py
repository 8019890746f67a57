"""Puts the tables of measured speed into docs/performance.md, and those of the classes that matter into
README.md: ``python benchmarks/readme.py FILE.json ...``.

A row is a class of shapes and a number of threads, with the geometric mean of torch.nn's time divided by
fastrnn's and the best and the worst shape; then the mean and the worst against other peers that were timed.
Nothing is left out, losses least of all.
"""

import argparse
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from fastrnn.bench.results import RIVAL, Record, Results, geometric_mean

ROOT = Path(__file__).parent.parent
# README.md has these classes of ordinary runs.
MATTER = [
    "LSTM training", "LSTM inference", "GRU training", "GRU inference", "RNN training",
    "LSTM packed training", "LSTM one step", "GRU one step", "short calls training", "short calls inference",
    "LSTM bf16 training", "LSTM bf16 inference",
    "GRU bf16 training", "GRU bf16 inference", "LSTM tf32 training", "LSTM f32 training",
]  # fmt: skip
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"


def describe(record: Record) -> str:
    return f"{record.ratios[RIVAL].median:.2f} ({record.case})"


def beside(peer: str, records: list[Record]) -> str:
    """The mean and the worst against another peer, where it was timed."""
    ratios = [record.ratios[peer].median for record in records if peer in record.ratios]
    return f"{geometric_mean(ratios):.2f}, {min(ratios):.2f}" if ratios else ""


def machine(environment: dict) -> str:
    if "device" in environment:
        return f"{environment['device']}, against cuDNN {environment['cudnn']}"
    return f"{environment['cpu']} ({environment['kernels']} kernels)"


def conditions(environment: dict) -> str:
    """The conditions that set a run apart from an ordinary one; its figures are quoted with them."""
    parts = [f"`{name}={value}`" for name, value in environment.get("variables", {}).items()]
    prepacked = environment.get("prepacked")
    parts += ["inference after `fastrnn.prepack`"] * bool(prepacked)
    parts += [f"weights as {prepacked}"] * isinstance(prepacked, str)
    parts += [f"beside {environment.get('busy')} busy processes"] * bool(environment.get("busy"))
    return "".join(f", {part}" for part in parts)


def table(results: Results) -> str:
    """Markdown, class by class in the order of the records."""
    environment = results.environment
    peers = sorted({peer for record in results.records for peer in record.ratios} - {RIVAL})
    more = "".join(f" {peer}: mean, worst |" for peer in peers)
    lines = [
        f"Measured on {machine(environment)}, torch {environment['torch']}, "
        f"{str(environment['date'])[:10]}{conditions(environment)}.",
        "",
        f"| class | threads | shapes | mean | best | worst | slower than torch.nn |{more}",
        "| --- | --- | --- | --- | --- | --- | --- |" + " --- |" * len(peers),
    ]
    groups = list(dict.fromkeys((record.group, record.threads) for record in results.records))
    ordered = sorted(results.records, key=lambda record: groups.index((record.group, record.threads)))
    for (group, threads), members in groupby(ordered, key=lambda record: (record.group, record.threads)):
        records = sorted(members, key=lambda record: record.ratios[RIVAL].median)
        ratios = [record.ratios[RIVAL].median for record in records]
        losses = sum(ratio < 1 for ratio in ratios)
        cells = [group, threads or "", len(ratios), f"**{geometric_mean(ratios):.2f}**"]
        cells += [describe(records[-1]), describe(records[0]), losses or "none"]
        cells += [beside(peer, records) for peer in peers]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def shortened(results: Results) -> Results:
    """The classes that matter, beside torch.nn alone."""
    records = [record for record in results.records if record.group in MATTER]
    alone = [replace(record, ratios={RIVAL: record.ratios[RIVAL]}) for record in records]
    return Results(results.environment, alone)


def insert(page: str, content: str) -> str:
    """The text with ``content`` between the two markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"a page with the tables must hold {BEGIN} and then {END}")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    runs = [Results.load(path) for path in parser.parse_args().results]
    ordinary = [shortened(run) for run in runs if not run.environment.get("prepacked")]
    for name, shown in (("docs/performance.md", runs), ("README.md", ordinary)):
        page = ROOT / name
        page.write_text(insert(page.read_text(), "\n\n".join(map(table, shown))))
