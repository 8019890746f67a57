"""The report of a run: one HTML page with everything on it, and its pictures as files."""

import base64
import html
import io
import itertools
import json
import logging
import platform
import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
import torch
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure

from fastrnn.training import plots
from fastrnn.training.errors import in_short
from fastrnn.training.gradient_flow import GradientFlow
from fastrnn.training.run import rows_of
from fastrnn.training.speed import compare_backends

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; overflow-wrap: anywhere }
h1 { margin-bottom: 0 } h2 { border-bottom: 1px solid #ddd; margin-top: 2.2rem }
table { border-collapse: collapse } td, th { padding: .2rem .9rem .2rem 0; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f6f6f4; padding: .8rem; overflow-x: auto; font-size: 13px; line-height: 1.4 }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: .8rem }
img { max-width: 100% } .verdict { font-weight: 600 }
"""
Section = tuple[str, str]  # title and HTML
METRICS = 24  # with a picture of their own
log = logging.getLogger(__name__)


class Report(L.Callback):
    """Writes ``report.html`` and ``figures/*.png`` into the run's folder when fit or test ends.

    It is written too when a gradient that is not finite ends the training. A part that cannot be made
    is replaced by a line that says why, which is logged as a warning: a finished run keeps its results.

    Args:
        write: make the report at all.
        compare: measure a few training steps beside the same model on torch.nn.
    """

    def __init__(self, write: bool = True, compare: bool = True) -> None:
        self.write, self.compare = write, compare
        self.speed: dict[str, float] = {}
        self.path: Path | None = None
        self._batch: Any = None
        self._unmeasured = ""
        self._complaints: dict[str, str] = {}  # by part

    def on_train_batch_end(self, *args: Any) -> None:
        if self._batch is None or args[3].tokens >= self._batch.tokens:
            self._batch = args[3]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._unmeasured = self._try("speed beside torch.nn", lambda: self._measure(trainer, pl_module))
        self._write(trainer, pl_module, trainer.log_dir)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module, trainer.log_dir)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, FloatingPointError):
            self._write(trainer, pl_module, trainer.log_dir)

    def _measure(self, trainer: L.Trainer, task: Any) -> str:
        comparable = self.compare and trainer.world_size == 1 and self._batch is not None
        if comparable and not task.stack.options and task.stack.backend != "torch":
            device, precision = trainer.strategy.root_device, trainer.precision_plugin
            self.speed = compare_backends(task, self._batch, device=device, precision=precision)
        return ""

    def _try(self, part: str, make: Callable[[], str]) -> str:
        """The HTML of a part, or a line that says why there is none."""
        try:
            return make()
        except Exception as error:
            line = f"the report goes without: {part} ({in_short(error)})"
            if self._complaints.get(part) != line:
                log.warning("%s", line)
            self._complaints[part] = line
            return f"<p>{html.escape(line)}</p>"

    @rank_zero_only
    @matplotlib.rc_context({"text.usetex": False})  # names are no LaTeX
    def _write(self, trainer: L.Trainer, task: L.LightningModule, log_dir: str | None) -> None:
        """All processes ask for ``log_dir``, which they agree on; the first one writes."""
        if self.write and log_dir is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._try("all of it", lambda: self._save(trainer, task, Path(log_dir)))

    def _save(self, trainer: L.Trainer, task: Any, folder: Path) -> str:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for old in (folder / "figures").glob("*.png"):  # of the report that this one replaces
            old.unlink()
        rows = rows_of(trainer)
        for logger in trainer.loggers:
            logger.save()
        exhibits: list[tuple[str, Figure | str]] = []

        def collect() -> str:  # those before one that fails are kept
            exhibits.extend(task.exhibits())
            return ""

        unseen = self._try("exhibits", collect)
        parts: list[tuple[str, Callable[[], str]]] = [
            ("Results", lambda: results(rows)),
            ("Curves", lambda: curves(rows, folder)),
            ("Gradient flow", lambda: "".join(content for _, content in flow_sections(trainer, folder))),
            *((title, partial(exhibit, title, shown, folder)) for title, shown in exhibits),
            ("Exhibits", lambda: unseen),
            ("Speed", lambda: speed_table(rows, self.speed) + self._unmeasured),
            ("Configuration", lambda: configuration(folder, task)),
            ("Environment", lambda: table(environment())),
        ]
        made = [(title, self._try(title, make)) for title, make in parts]
        path = folder / "report.html"
        text = page(f"{type(task).__name__} in {folder}", made)
        path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
        self.path = path
        return ""


def page(title: str, parts: list[Section]) -> str:
    body = "\n".join(f"<h2>{html.escape(name)}</h2>\n{content}" for name, content in parts if content)
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'>{head}<h1>{html.escape(title)}</h1>\n{body}</html>\n"


def table(values: dict[str, Any], *columns: str) -> str:
    """A row for each key; a tuple's values fill several cells."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in columns) + "</tr>"]
    for key, value in values.items():
        cells = value if isinstance(value, tuple) else (value,)
        shown = "".join(f"<td class=n>{html.escape(number(c))}</td>" for c in cells)
        lines.append(f"<tr><td>{html.escape(key)}</td>{shown}</tr>")
    return f"<table>{''.join(lines)}</table>"


def number(value: Any) -> str:
    return (
        f"{value:,.4g}"
        if isinstance(value, float) and abs(value) < 1e4
        else (f"{value:,.0f}" if isinstance(value, float) else str(value))
    )


def results(rows: plots.Rows) -> str:
    """The last and the best value of each metric."""
    found = {}
    for key in sorted({k for row in rows for k in row if k.startswith(("train/", "val/", "test/"))}):
        _, values = plots.series(rows, key)
        rising = key.rpartition("/")[2] in ("accuracy", "f1")
        found[key] = (values[-1], (max if rising else min)(values))
    return table(found, "", "last", "best")


def curves(rows: plots.Rows, folder: Path) -> str:
    """A picture for each validation metric, for the gradient and for the learning rates."""
    keys = sorted({k for row in rows for k in row})
    metrics = [k.removeprefix("val/") for k in keys if k.startswith("val/")]
    left = len(metrics) - METRICS
    note = f"<p>{left} more metrics are in metrics.csv.</p>" if left > 0 else ""
    return pictures(curve_figures(rows, keys, metrics[:METRICS]), folder) + note


def curve_figures(rows: plots.Rows, keys: list[str], metrics: list[str]) -> Iterator[tuple[str, Figure]]:
    for metric in metrics:
        yield metric, plots.curves(rows, metric)
    if "gradient/norm" in keys:
        yield "gradient norm", plots.single(rows, "gradient/norm", "gradient norm before clipping")
    rates = [k for k in keys if k.startswith("lr-") and not k.endswith("/pg2")]
    for key in rates[:METRICS]:
        yield "learning rate", plots.single(rows, key, "learning rate")


def pictures(figures: Iterator[tuple[str, Figure]], folder: Path) -> str:
    shown = "\n".join(picture(name, figure, folder) for name, figure in figures)
    return f"<div class=pictures>{shown}</div>"


def picture(name: str, figure: Figure, folder: Path) -> str:
    """The figure as a file of its own, whatever it is called, and as HTML that holds it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    stem = re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")[:60] or "picture"
    names = (f"{stem}{f'_{i}' if i > 1 else ''}.png" for i in itertools.count(1))
    free = next(path for n in names if not (path := folder / "figures" / n).exists())
    free.write_bytes(buffer.getvalue())
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(name)}' src='data:image/png;base64,{data}'>"


def exhibit(title: str, shown: Figure | str, folder: Path) -> str:
    if isinstance(shown, Figure):
        return picture(title, shown, folder)
    return f"<pre>{html.escape(shown)}</pre>"


def flow_sections(trainer: L.Trainer, folder: Path) -> Iterator[Section]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientFlow) and callback.records:
            callback.save(folder / "gradient_flow.npz")
            verdict = f"<p class=verdict>{html.escape(callback.verdict())}</p>"
            verdict += f"<p>{html.escape(callback.effort())}</p>"
            yield "Gradient flow", verdict + pictures(callback.figures(), folder)


def speed_table(rows: plots.Rows, speed: dict[str, float]) -> str:
    _, rates = plots.series(rows, "speed/tokens_per_s")
    shown: dict[str, Any] = {"tokens per second, whole run": rates[-1]} if rates else {}
    if speed:
        shown |= {
            "tokens per second, measured beside torch.nn": speed["tokens_per_s"],
            "tokens per second of torch.nn": speed["torch_tokens_per_s"],
            "time of torch.nn over time of this model": speed["speedup"],
        }
    return table(shown) if shown else ""


def configuration(folder: Path, task: L.LightningModule) -> str:
    saved = folder / "config.yaml"
    text = (
        saved.read_text(encoding="utf-8")
        if saved.exists()
        else json.dumps(dict(task.hparams), indent=2, default=str)
    )
    return f"<pre>{html.escape(text)}</pre>"


def environment() -> dict[str, str]:
    """Versions and machine of the run."""
    found = {"Python": platform.python_version(), "machine": platform.platform()}
    for package in ("fastrnn", "torch", "lightning"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    found["threads"] = str(torch.get_num_threads())
    found["CPU"] = torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found
