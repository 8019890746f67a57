"""Two files of results side by side, and whether the newer one is slower beyond the noise.

Ratios are compared, not times: what slows both libraries cancels. A case has regressed when the
quartile ranges of its two ratios do not touch and the median has fallen by more than MARGIN; the
mirror image is an improvement. Cases for which a file had too few quiet rounds are not judged.
"""

import argparse
from pathlib import Path

from rich.table import Table

from fastrnn.bench.results import RIVAL, Record, Results
from fastrnn.bench.tables import make_console, make_table, ratio_text

MARGIN = 0.05  # two runs of the same code differ by up to this where their quartiles do not touch

SAME, SLOWER, FASTER, DISTURBED = "same", "SLOWER", "faster", "not judged: disturbed"
STYLE = {SAME: "", SLOWER: "bold red", FASTER: "green", DISTURBED: "yellow"}


def verdict(old: Record, new: Record) -> str:
    if old.disturbed or new.disturbed:
        return DISTURBED
    before, after = old.ratios[RIVAL], new.ratios[RIVAL]
    if after.high < before.low and after.median < before.median * (1 - MARGIN):
        return SLOWER
    if after.low > before.high and after.median * (1 - MARGIN) > before.median:
        return FASTER
    return SAME


def compare(argv: list[str]) -> int:
    """0: no regression, 1: at least one, 2: the files cannot be compared."""
    parser = argparse.ArgumentParser("python -m fastrnn bench compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(argv)
    console = make_console()
    try:
        old, new = Results.load(options.old), Results.load(options.new)
    except ValueError as error:
        console.print(f"fastrnn: {error}", style="red")
        return 2
    before = {record.key: record for record in old.records}
    pairs = [(before[record.key], record) for record in new.records if record.key in before]
    if not pairs:
        console.print("fastrnn: the files have no case in common", style="red")
        return 2
    for name in ("cpu", "kernels", "torch"):
        if old.environment[name] != new.environment[name]:
            values = f"{old.environment[name]} and {new.environment[name]}"
            console.print(f"The runs differ in {name}: {values}", style="yellow")
    verdicts = [verdict(*pair) for pair in pairs]
    console.print(_table(pairs, verdicts))
    counts = {word: verdicts.count(word) for word in STYLE}
    left_out = len(old.records) + len(new.records) - 2 * len(pairs)
    console.print(", ".join(f"{n} {word}" for word, n in counts.items()), end="")
    console.print(f"; {left_out} in one file only")
    return 1 if SLOWER in verdicts else 0


def _table(pairs: list[tuple[Record, Record]], verdicts: list[str]) -> Table:
    columns = ("mode", "thr", "old", "new", "new / old", "verdict")
    table = make_table("torch time / fastrnn time: median, quartiles", "case", *columns)
    for (old, new), word in zip(pairs, verdicts, strict=True):
        change = new.ratios[RIVAL].median / old.ratios[RIVAL].median
        texts = ratio_text(old, RIVAL), ratio_text(new, RIVAL), f"{change:.2f}"
        table.add_row(new.case, new.mode, str(new.threads), *texts, word, style=STYLE[word])
    return table
