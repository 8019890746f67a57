"""The report stands whatever things are called, and does not grow with their number."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import trainer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from fastrnn.training import Forecaster, GradientFlow, Report, SeriesData, Stack, plots, report
from fastrnn.training.report import curves, page, picture, table

NAMES = [
    "Price $",
    "US$/EU$",
    "$_low to $^",
    "$5_$10",
    r"$\alpha$",
    r"a\frac",
    r"\$x\$ $y$",
    "_hidden",
    "50 %",
    "{x}^{",
    "",
    "a\nb\tc",
]
LONG = "How much do you agree with the following statement? " * 6


def pixels(shown: str, **how: bool) -> np.ndarray:
    figure = Figure(figsize=(3, 0.5))
    figure.text(0.1, 0.3, shown, **how)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


@pytest.mark.parametrize("name", NAMES)
def test_names_are_drawn_letter_by_letter(name: str) -> None:
    plain = " ".join(name.split())
    expected = pixels(f" {plain}" if plain.startswith("_") else plain, parse_math=False)
    assert np.array_equal(pixels(plots.text(name)), expected)


def test_long_names_are_cut_and_stay_apart() -> None:
    cut = plots.texts([f"{LONG}{i} of 3{LONG}" for i in range(3)] + [f"{LONG}4"])
    assert len(set(cut)) == 4
    assert all(len(c) < 50 for c in cut)
    assert plots.text("a\u202eb\ud800") == "ab"  # what has no glyph, or cannot be encoded


def legend(figure: Figure) -> list[str]:
    return [entry.get_text().strip() for entry in figure.axes[0].get_legend().get_texts()]


def many(count: int) -> dict[str, list[dict[str, float]]]:
    return {f"{LONG}{i}": [{"step": s, "train/loss": 1.0 + i} for s in range(3)] for i in range(count)}


PICTURES = {
    "confusion": lambda n: plots.confusion(np.eye(n, dtype=int), [f"{LONG}{i}" for i in range(n)]),
    "profile": lambda n: plots.profile({f"{LONG}{i}": np.ones(4) for i in range(n)}, LONG),
    "lines": lambda n: plots.lines([{"step": 0.0} | {f"{LONG}{i}": 1.0 for i in range(n)}], LONG),
    "overlay": lambda n: plots.overlay(many(n), "loss"),
    "heat_map": lambda n: plots.heat_map(np.ones((n, n)), range(n), LONG),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_do_not_grow_with_the_data(kind: str) -> None:
    few, more, most = (PICTURES[kind](n) for n in (3, 420, 500))
    assert tuple(most.get_size_inches()) == tuple(more.get_size_inches())
    assert max(most.get_size_inches()) < 18
    assert len(most.findobj(Text)) < 250
    assert few.axes[0].get_title() != LONG
    most.savefig("/dev/null", format="png")
    if kind == "heat_map":
        assert most.axes[0].collections[0].get_array().size < 200_000


def ink(figure: Figure) -> int:
    """Pixels of the axes' inside that are not white."""
    figure.axes[0].grid(False)
    if legend := figure.axes[0].get_legend():
        legend.set_visible(False)
    figure.canvas.draw()
    box = figure.axes[0].get_window_extent().padded(-6).extents.astype(int)
    image = np.asarray(figure.canvas.buffer_rgba())[::-1][box[1] : box[3], box[0] : box[2], :3]
    return int((image < 200).any(-1).sum())


ONE = [{"step": 7, "train/loss": 2.0, "norm": 3.0}]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.heat_map(np.full((1, 5), 0.1), [0], "one record"),
        lambda: plots.heat_map(np.full((4, 1), 0.1), [0, 1, 2, 3], "one step back"),
        lambda: plots.profile({"h": np.array([0.5])}, "one step back"),
        lambda: plots.lines([{"step": 7, "norm": 3.0}], "one record"),
        lambda: plots.single(ONE, "norm", "one record"),
        lambda: plots.curves(ONE, "loss"),
        lambda: plots.overlay({"run": ONE}, "loss"),
    ],
)
def test_a_single_value_is_seen(draw: Callable[[], Figure]) -> None:
    figure = draw()
    FigureCanvasAgg(figure)
    assert ink(figure) > 5


def test_the_cells_of_a_heat_map_lie_around_their_steps() -> None:
    assert list(plots.edges([3])) == [2.5, 3.5]
    assert list(plots.edges([0, 10, 30])) == [-5, 5, 20, 40]


def test_a_large_confusion_matrix_shows_the_classes_with_the_most_errors() -> None:
    matrix = np.diag(np.full(300, 7))
    matrix[250, 17] = 3
    figure = plots.confusion(matrix, [f"class {i}" for i in range(300)])
    ticks = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert len(ticks) == plots.CLASSES
    assert {"class 17", "class 250"} <= set(ticks)
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    assert drawn[ticks.index("class 250"), ticks.index("class 17")] == 3
    assert "of 300 classes" in figure.axes[0].get_title()
    assert len(plots.confusion(matrix[:40, :40], ["a"] * 40).axes[0].get_yticklabels()) == 40


def test_the_largest_norms_and_every_kind_of_name_are_in_the_legend() -> None:
    rows = [{"step": 0.0, **{f"p{i}": float(i) for i in range(100)}, "lost": float("nan")}]
    assert legend(plots.lines(rows, "norms")) == ["lost", *(f"p{i}" for i in range(99, 84, -1))]
    names = ["_a", "$b$", "c"]
    figure = plots.profile({name: np.ones(2) for name in names}, "norms")
    assert legend(figure) == ["_a", r"\$b\$", "c"]


def test_each_picture_is_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    names = [
        "load %",
        "load $",
        "load_#",
        "LOAD",
        "Straße",
        "温度",
        "😀",
        "../up",
        "a/b",
        ".",
        "",
        LONG,
        LONG + "!",
    ]
    for name in names:
        assert "data:image/png;base64," in picture(name, Figure(figsize=(1, 1)), tmp_path)
    files = [file.name for file in (tmp_path / "figures").iterdir()]
    assert len(files) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_]+\.png", name) and len(name) < 100 for name in files)
    assert {"load.png", "load_2.png"} <= set(files)


def test_names_are_text_in_html() -> None:
    name = "<b>&'\""
    shown = page(name, [(name, table({name: name}, name))])
    assert "<b>" not in shown
    assert shown.count("&lt;b&gt;&amp;&#x27;&quot;") == 6


def test_only_so_many_metrics_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "METRICS", 4)
    (tmp_path / "figures").mkdir()
    rows = [{"step": float(s), **{f"val/class {i}": 1.0 for i in range(6)}} for s in range(2)]
    shown = curves(rows, tmp_path)
    assert shown.count("<img") == 4 == len(list((tmp_path / "figures").iterdir()))
    assert "2 more metrics are in metrics.csv" in shown


@pytest.mark.parametrize("count", [2, 30])
def test_a_forecast_of_many_columns_ends_with_a_bounded_report(tmp_path: Path, count: int) -> None:
    columns = [f"${LONG}_{i}$" for i in range(count)]
    path = tmp_path / "wide.csv"
    waves = np.sin(np.arange(120)[:, None] / 5 + np.arange(count))
    np.savetxt(path, waves, delimiter=",", header=",".join(columns), comments="", encoding="utf-8")
    data = SeriesData(str(path), columns, window=8, horizon=2)
    written = Report(compare=False)
    flow = GradientFlow(every_n_steps=1 if count > 8 else 0)
    run = trainer(tmp_path, flow, written, max_steps=2, limit_val_batches=1, limit_test_batches=1)
    model = Forecaster(data.spec, Stack(hidden_size=4, num_layers=6))
    run.fit(model, datamodule=data)
    run.test(model, datamodule=data, verbose=False)
    assert written.path is not None
    files = sorted(file.name for file in (written.path.parent / "figures").iterdir())
    assert sum(name.startswith("forecast_of") for name in files) == min(count, 8)
    assert sum(name.startswith("flow_loss") for name in files) == (8 if count > 8 else 0)  # of 6 h, 6 c
    shown = written.path.read_text(encoding="utf-8")
    assert shown.count("<img") == len(files)  # of the second report, not of both
    assert f"Forecast of ${LONG}_0$" in shown
    assert ("8 of 30 columns are drawn" in shown) == (count == 30)
