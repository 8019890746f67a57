"""The pictures of a report, each a function from plain data to a matplotlib figure."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

Rows = Sequence[dict[str, float]]  # of the run's log: a step, and what was logged there


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
    ax.set(title=title, xlabel=x, ylabel=y)
    return figure, ax


def curves(rows: Rows, metric: str) -> Figure:
    """Training (thin: each logged step; thick: its running mean) and validation of one metric."""
    figure, ax = axes(metric, "optimizer step", metric)
    steps, values = series(rows, f"train/{metric}")
    if values:
        ax.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        mean = smooth(values, max(1, len(values) // 30))
        ax.plot(steps, mean, color="tab:blue", label="training")
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
    ax.plot(steps, values, linewidth=0.9)
    positive = [v for v in values if v > 0 and math.isfinite(v)]
    if positive and max(positive) > 100 * min(positive):
        ax.set_yscale("log")
    ax.grid(alpha=0.3)
    return figure


def confusion(matrix: np.ndarray, classes: Sequence[str]) -> Figure:
    """Counts of true (rows) against predicted (columns) classes [C, C]."""
    side = max(4.0, 0.45 * len(classes) + 1.5)
    figure, ax = axes("Confusion matrix", "predicted", "true", (side + 0.8, side))
    image = ax.imshow(matrix, cmap="Blues")
    ax.set_xticks(range(len(classes)), classes, rotation=90 if len(classes) > 12 else 0)
    ax.set_yticks(range(len(classes)), classes)
    if len(classes) <= 20:
        for i, j in zip(*np.nonzero(matrix), strict=True):
            dark = matrix[i, j] > 0.6 * matrix.max()
            text = {"ha": "center", "va": "center", "color": "white" if dark else "black"}
            ax.text(j, i, int(matrix[i, j]), **text)
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
        ax.set(ylabel=name)
        ax.grid(alpha=0.3)
    ax.set(xlabel="steps from now")
    figure.axes[0].legend()
    return figure


def heat_map(norms: np.ndarray, steps: Sequence[int], title: str) -> Figure:
    """Gradient norms [records, K]: steps back from the loss against the training step."""
    figure, ax = axes(title, "steps back in time", "optimizer step", (7.2, 3.4))
    image = ax.pcolormesh(
        np.arange(norms.shape[1]),
        np.asarray(steps),
        np.log10(np.maximum(norms, 1e-12)),
        shading="nearest",
        cmap="magma",
    )
    figure.colorbar(image, ax=ax, label="log10 of the norm")
    return figure


def profile(norms: dict[str, np.ndarray], title: str) -> Figure:
    """Gradient norms [K] of several quantities against steps back, logarithmic."""
    figure, ax = axes(title, "steps back in time", "norm of the gradient")
    for label, values in norms.items():
        ax.semilogy(np.maximum(values, 1e-20), label=label)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return figure


def lines(rows: Rows, title: str) -> Figure:
    """Every quantity of the rows over the steps, logarithmic."""
    figure, ax = axes(title, "optimizer step", title, (7.2, 3.8))
    for key in [k for k in rows[-1] if k != "step"]:
        steps, values = series(rows, key)
        ax.semilogy(steps, values, linewidth=0.9, label=key)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def overlay(runs: dict[str, Rows], metric: str) -> Figure:
    """Training (thin) and validation (dots) of one metric in several runs."""
    figure, ax = axes(metric, "optimizer step", metric, (7.2, 4.2))
    for i, (name, rows) in enumerate(runs.items()):
        color = f"C{i}"
        steps, values = series(rows, f"train/{metric}")
        ax.plot(steps, values, color=color, alpha=0.7, linewidth=0.9, label=name)
        steps, values = series(rows, f"val/{metric}")
        ax.plot(steps, values, "o", color=color, markersize=4)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return figure
