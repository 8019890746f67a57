"""The pictures of a report, each a function from plain data to a matplotlib figure.

A picture's size does not grow with the data: many classes, layers, steps or runs are thinned out, and
long names are cut.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Rows = Sequence[dict[str, float]]  # of the run's log: a step, and what was logged there
Item = TypeVar("Item")
CLASSES = 40  # rows and columns of a confusion matrix
CURVES = 16  # in one picture of many quantities
RUNS = 40  # in the legend of a comparison
CELLS = 400  # along each side of a heat map


def spread(items: Iterable[Item], most: int) -> list[Item]:
    """At most so many of the items, evenly spaced from the first to the last."""
    found = list(items)
    if len(found) <= most:
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, most).astype(int)]


def text(name: object, width: int = 40) -> str:
    """A name on one line, cut in its middle, for matplotlib to draw letter by letter.

    matplotlib takes what stands between two dollars for a formula, and leaves names that begin with
    an underscore out of a legend.
    """
    shown = "".join(c for c in " ".join(str(name).split()) if c.isprintable())
    if len(shown) > width:
        shown = f"{shown[: width // 2]}…{shown[-(width // 2) :]}"
    shown = shown.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def texts(names: Sequence[object], width: int = 40) -> list[str]:
    """``text`` of each name; names that look the same when cut are numbered."""
    cut = [text(name, width) for name in names]
    alike = {c for c, count in Counter(cut).items() if count > 1}
    return [f"{c} ({i + 1})" if c in alike else c for i, c in enumerate(cut)]


def series(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one logged quantity."""
    found = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in found], [value for _, value in found]


def smooth(values: list[float], window: int) -> list[float]:
    """Means of up to ``window`` values up to each one."""
    sums = np.cumsum([0.0, *values])
    starts = np.maximum(0, np.arange(1, len(sums)) - window)
    return list((sums[1:] - sums[starts]) / (np.arange(1, len(sums)) - starts))


def axes(title: str, x: str, y: str, size: tuple[float, float] = (6.4, 3.6)) -> tuple:
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    ax.set(title=text(title, 70), xlabel=text(x), ylabel=text(y))
    return figure, ax


def look(i: int) -> dict[str, str]:
    """Colour and dashes of the i-th curve: ten colours, then the same ones dashed."""
    return {"color": f"C{i}", "linestyle": ("-", "--", ":", "-.")[i // 10 % 4]}


def dot(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """A curve of one point is a dot: a line through it would not be seen."""
    return {"marker": "."} if len(values) == 1 else {}


def edges(centres: Sequence[float] | np.ndarray) -> np.ndarray:
    """The n + 1 edges of n cells, half-way between their centres; a single cell is one wide."""
    c = np.asarray(centres, float)
    half = np.diff(c) / 2 if len(c) > 1 else np.array([0.5])
    return np.append(c - np.append(half[:1], half)[: len(c)], c[-1] + half[-1])


def beside(entries: int = 9) -> dict[str, Any]:
    """Where the legend of many entries stands: beside the axes."""
    return {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if entries > 8 else {}


def curves(rows: Rows, metric: str) -> Figure:
    """Training (thin: each logged step; thick: its running mean) and validation of one metric."""
    figure, ax = axes(metric, "optimizer step", metric)
    steps, values = series(rows, f"train/{metric}")
    if values:
        ax.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        mean = smooth(values, max(1, len(values) // 30))
        ax.plot(steps, mean, color="tab:blue", label="training", **dot(mean))
    steps, values = series(rows, f"val/{metric}")
    if values:
        ax.plot(steps, values, "o-", color="tab:orange", markersize=3, label="validation")
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def single(rows: Rows, key: str, label: str) -> Figure:
    """One logged quantity over the steps; logarithmic where its values span two decades."""
    figure, ax = axes(label, "optimizer step", label)
    steps, values = series(rows, key)
    ax.plot(steps, values, linewidth=0.9, **dot(values))
    positive = [v for v in values if v > 0 and math.isfinite(v)]
    if positive and max(positive) > 100 * min(positive):
        ax.set_yscale("log")
    ax.grid(alpha=0.3)
    return figure


def confusion(matrix: np.ndarray, classes: Sequence[str]) -> Figure:
    """Counts of true (rows) against predicted (columns) classes [C, C].

    Of more than ``CLASSES`` classes those with the most errors are drawn.
    """
    title, count = "Confusion matrix", len(classes)
    if count > CLASSES:
        errors = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diagonal()
        worst = np.sort(np.argsort(-errors, kind="stable")[:CLASSES])
        matrix, classes = matrix[np.ix_(worst, worst)], [classes[i] for i in worst]
        title = f"Confusion matrix: the {CLASSES} of {count} classes with the most errors"
    names = texts(classes, 24)
    longest = max(map(len, names))
    upright = len(names) * longest > 40 or len(names) > 12
    side = max(4.0, 0.3 * len(names) + 1.5) + 0.07 * longest  # inches
    figure, ax = axes(title, "predicted", "true", (side + 0.8, side))
    image = ax.imshow(matrix, cmap="Blues")
    ax.set_xticks(range(len(names)), names, rotation=90 if upright else 0)
    ax.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for i, j in zip(*np.nonzero(matrix), strict=True):
            dark = matrix[i, j] > 0.6 * matrix.max()
            font = {"ha": "center", "va": "center", "color": "white" if dark else "black"}
            ax.text(j, i, int(matrix[i, j]), fontsize=9, **font)
    figure.colorbar(image, ax=ax, shrink=0.8)
    return figure


def forecast(past: np.ndarray, future: np.ndarray, predicted: np.ndarray, name: str) -> Figure:
    """A few windows: past [W, T], what came [W, K], what was predicted [W, K]."""
    figure = Figure(figsize=(9.0, 2.4 * len(past)), layout="constrained")
    for ax, p, f, q in zip(
        figure.subplots(len(past), 1, squeeze=False)[:, 0], past, future, predicted, strict=True
    ):
        shown = p[-4 * len(f) :]
        ahead = np.arange(len(f) + 1)
        ax.plot(np.arange(1 - len(shown), 1), shown, color="gray", label="past")
        ax.plot(ahead, [p[-1], *f], "o-", color="black", markersize=3, label="what came")
        ax.plot(ahead, [p[-1], *q], "o--", color="tab:orange", markersize=3, label="forecast")
        ax.set(ylabel=text(name, 24))
        ax.grid(alpha=0.3)
    ax.set(xlabel="steps from now")
    figure.axes[0].legend()
    return figure


def heat_map(norms: np.ndarray, steps: Sequence[int], title: str) -> Figure:
    """Gradient norms [records, K]: steps back from the loss against the training step."""
    figure, ax = axes(title, "steps back in time", "optimizer step", (7.2, 3.4))
    records, back = (np.array(spread(range(n), CELLS)) for n in norms.shape)
    image = ax.pcolormesh(
        edges(back),
        edges(np.asarray(steps)[records]),
        np.log10(np.maximum(norms[np.ix_(records, back)], 1e-12)),
        cmap="magma",
    )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=ax, label="log10 of the norm")
    return figure


def profile(norms: dict[str, np.ndarray], title: str) -> Figure:
    """Gradient norms [K] of several quantities against steps back, logarithmic."""
    shown = spread(norms, CURVES)
    if len(shown) < len(norms):
        title = f"{title}: {len(shown)} of {len(norms)} states"
    figure, ax = axes(title, "steps back in time", "norm of the gradient")
    for i, (key, label) in enumerate(zip(shown, texts(shown), strict=True)):
        ax.semilogy(np.maximum(norms[key], 1e-20), label=label, **look(i), **dot(norms[key]))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, **beside(len(shown)))
    return figure


def lines(rows: Rows, title: str) -> Figure:
    """The quantities of the rows that are largest in the last one, over the steps, logarithmic."""
    keys = [k for k in rows[-1] if k != "step"]
    if len(keys) > CURVES:
        title = f"{title}: the {CURVES} largest of {len(keys)}"
        keys = sorted(keys, key=lambda k: -np.nan_to_num(rows[-1][k], nan=np.inf))[:CURVES]
    figure, ax = axes(title, "optimizer step", "norm", (7.2, 3.8))
    for i, (key, label) in enumerate(zip(keys, texts(keys), strict=True)):
        steps, values = series(rows, key)
        ax.semilogy(steps, values, linewidth=0.9, label=label, **look(i), **dot(values))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, **beside())
    return figure


def overlay(runs: Mapping[str, Rows], metric: str) -> Figure:
    """Training (thin) and validation (dots) of one metric in several runs."""
    named = min(len(runs), RUNS)
    size = (7.2, 4.2) if named <= 8 else (9.6, 4.2 + 0.1 * named)
    figure, ax = axes(metric, "optimizer step", metric, size)
    names = texts(list(runs))
    for i, (name, rows) in enumerate(zip(names, runs.values(), strict=True)):
        steps, values = series(rows, f"train/{metric}")
        label = name if i < RUNS else "_"  # matplotlib's word for none
        ax.plot(steps, values, alpha=0.7, linewidth=0.9, label=label, **look(i), **dot(values))
        steps, values = series(rows, f"val/{metric}")
        ax.plot(steps, values, "o", color=f"C{i}", markersize=4)
    ax.grid(alpha=0.3)
    ax.legend(
        fontsize=8, title=f"{named} of {len(runs)} runs" if len(runs) > named else None, **beside(named)
    )
    return figure
