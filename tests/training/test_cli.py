"""The command line: every shipped configuration runs, and leaves a report that can be read."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import RunningStage

from fastrnn.training.arguments import load_value
from fastrnn.training.cli import CONFIGS, main, run
from fastrnn.training.guide import settings
from fastrnn.training.progress import Pace

SHORT = [
    "--trainer.max_steps=3",
    "--trainer.max_epochs=-1",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.val_check_interval=2",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--flow.every_n_steps=2",
]
SMALLER = {"shakespeare": ["--data.rows=4", "--data.limit=200000", "--model.stack.num_layers=1"]}


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("*.yaml")))
def test_each_configuration_runs_and_reports(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    more = [*SHORT, *SMALLER.get(name, []), f"--runs={tmp_path}"]
    assert main(["fit", "--config", name, *more]) == 0
    report = Path(re.findall(r"report: (.+)", capsys.readouterr().out)[-1])
    page = report.read_text(encoding="utf-8")
    for part in ("Results", "Curves", "Gradient flow", "Speed", "Configuration", "Environment"):
        assert f"<h2>{part}</h2>" in page
    assert "test/" in page
    assert page.count("data:image/png;base64,") == len(list((report.parent / "figures").iterdir()))
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)  # nothing is fetched
    with open(report.parent / "metrics.csv", encoding="utf-8") as file:
        assert any(row.get("train/loss") for row in csv.DictReader(file))
    checkpoints = report.parent / "checkpoints"
    assert {p.name for p in checkpoints.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 3


def test_validate_test_and_predict_take_a_checkpoint(
    tmp_path: Path, text_file: str, capsys: pytest.CaptureFixture
) -> None:
    given = ["--config", "shakespeare", f"--runs={tmp_path}", f"--data.paths=['{text_file}']"]
    given += ["--data.rows=4", "--data.k1=16", "--model.stack.hidden_size=16"]
    quiet = ["--trainer.enable_progress_bar=false"]
    assert main(["fit", *given, *SHORT, "--tensorboard=true"]) == 0
    run = tmp_path / "shakespeare/version_0"
    assert list((run / "tensorboard").glob("events.*"))
    best = f"--ckpt_path={run}/checkpoints/best.ckpt"
    assert main(["test", *given]) == 2
    assert "test needs --ckpt_path" in capsys.readouterr().err
    assert main(["validate", *given, *quiet, best]) == 0
    assert main(["test", *given, *quiet, best]) == 0
    prompts = "--data.prompts=['line', 'text']"
    assert main(["predict", *given, *quiet, best, prompts]) == 0
    text = (tmp_path / "shakespeare-predict/version_0/predictions.json").read_text()
    assert '"line' in text
    capsys.readouterr()
    assert main(["predict", *given, *quiet, best, "--data.prompts=['é']"]) == 2
    assert "does not know: 'é'" in capsys.readouterr().err
    other = ["--model.stack.hidden_size=24"]
    assert main(["test", *given, *other, *quiet, best]) == 2
    assert "stack.hidden_size is 16 there, 24 here" in capsys.readouterr().err
    assert main(["test", "--config", "sunspots", f"--runs={tmp_path}", *quiet, best]) == 2
    assert "another task's: LanguageModel there, Forecaster here" in capsys.readouterr().err


def test_control_characters_in_a_path_are_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a Latin-1 locale a path in UTF-8 has some; YAML refuses them, so that a list of paths was none."""
    monkeypatch.chdir(tmp_path)
    name = "ä b 文 'q'.txt".encode().decode("latin-1")
    Path(name).write_text("abc " * 200)
    given = ["--data.rows=2", "--data.k1=8", "--model.stack.hidden_size=4", "--trainer.max_steps=2"]
    given += ["--trainer.val_check_interval=2", f'--data.paths=["{name}"]', "--report.compare=false"]
    assert main(["fit", "--config", "shakespeare", *given]) == 0
    assert load_value(f'{{a: ["{name}", 1.5], "{name}": null}}') == {"a": [name, 1.5], name: None}
    again = ["--config", "runs/shakespeare/version_0/config.yaml", "--name=again", "--report.write=false"]
    assert main(["fit", *again]) == 0  # the configuration that was written has the path, too


def test_a_spreadsheets_csv_is_read_by_pandas_options(tmp_path: Path) -> None:
    path = tmp_path / "läst.csv"
    rows = [f"{i % 28 + 1}.{i // 28 + 1:02}.2025;1.{i:03},5" for i in range(100)]
    text = "# by hand\r\nTag;Läst\r\n" + "\r\n".join(rows).replace("1.050,5", "fehlt") + "\r\n"
    path.write_bytes(text.encode("cp1252"))
    form = ["--data.sep=;", "--data.decimal=,", "--data.thousands=.", "--data.encoding=cp1252"]
    form += ["--data.comment=#", "--data.na_values=fehlt", "--data.missing=interpolate"]
    form += ["--data.parse_dates=['Tag']", "--data.date_format=%d.%m.%Y"]
    data = [f"--data.source={path}", "--data.columns=['Läst', 'Tag']", "--data.window=4", "--data.horizon=1"]
    given = [f"--config={CONFIGS}/co2.yaml", *SHORT, f"--runs={tmp_path}", "--data.season=null"]
    cli = run(["fit", *given, *data, *form, "--report.compare=false"])
    assert cli.datamodule.table[:, 0].tolist() == [1000.5 + i for i in range(100)]
    assert cli.datamodule.table[1, 1] - cli.datamodule.table[0, 1] == 86400


def test_a_text_on_one_line_is_learnt_tested_and_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "genome.txt"
    path.write_text("gattaca " * 500)
    given = ["--config", "shakespeare", f"--runs={tmp_path}", f"--data.paths=['{path}']", "--name=genome"]
    given += ["--data.rows=4", "--data.k1=16", "--model.stack.hidden_size=8", "--model.sampling.length=9"]
    assert main(["fit", *given, *SHORT, "--report.compare=false"]) == 0
    assert "Sample" in (tmp_path / "genome/version_0/report.html").read_text(encoding="utf-8")
    best = f"--ckpt_path={tmp_path}/genome/version_0/checkpoints/best.ckpt"
    assert main(["predict", *given, "--trainer.enable_progress_bar=false", best]) == 0
    (predicted,) = json.loads((tmp_path / "genome-predict/version_0/predictions.json").read_text())
    assert len(predicted) == 10
    assert predicted[0] == " "
    capsys.readouterr()
    assert main(["fit", *given, *SHORT, "--model.sampling.top_k=0"]) == 2
    assert "top_k must be a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "co2", "--data.sep=;;"], "sep must be one ASCII character, and no quote, got ';;'"),
        (["--config", "shakespear"], "no configuration shakespear: give a file, or one of adding"),
        (["--config", "co2", "--data.missing=raise"], "59 missing values, the first in line 8"),
        (["--config", "co2", "--model.stack.cell=lsmt"], "cell must be one of lstm, gru, rnn, rnn_relu, got"),
        (["--config", "co2", "--data.window=3000"], "too short for a window of 3000"),
        (["--config", "shakespeare", "--data.paths=['/absent']"], "cannot read /absent"),
        (["--config", "shakespeare", "--data.paths=/absent"], "cannot read /absent"),
        ([], "begin with python -m fastrnn train fit --config NAME, of adding"),
        (["co2"], "unrecognized arguments: co2; there is --config co2"),
        (["--config", "my.csv"], "my.csv is no configuration in YAML; a CSV file is given as --data.source"),
        (["--data", "my.csv"], "data must be a class, such as SeriesData, TextData"),
        (["my.csv"], "unrecognized arguments: my.csv; a CSV file is given as --data.source FILE"),
        (["--config", "co2", "--lr=1"], "unrecognized arguments: --lr=1; there is --model.optim.lr"),
        (["--config", "co2", "--epochs", "1"], "there is --trainer.max_epochs"),
        (["--config", "co2", "--data.sorce=my.csv"], "'sorce' is not accepted; there is --data.source"),
        (["--config", "co2", "--model.hidden_size=3"], "there is --model.stack.hidden_size"),
        (["--config", "co2", "--data.rows=3"], "--data.rows is a setting of TextData"),
        (["--config", "co2", "--data.source=my.csv"], "as --data.columns '[a, b]'; there are time, load"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.csv").write_text("time,load\n2025-01-01,3\n")
    assert main(["fit", *arguments, f"--runs={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize("argv", [[], ["--help"], ["fit", "-h"], ["fit", "--config", "co2", "--help"]])
def test_the_first_screen_says_how_to_begin(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 60
    assert all(re.search(rf"^  {path.stem} +\w", shown, re.M) for path in CONFIGS.glob("*.yaml"))
    named = set(re.findall(r"\b(?:model|data|trainer)\.(?!help|stack\.help|optim\.help)[\w.]+\w", shown))
    assert "model.optim.lr" in named
    assert named <= settings().keys()


def test_progress_in_lines_has_the_speed_and_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastrnn.training.progress.EVERY", 0.0)
    given = ["--data.length=8", "--data.epoch=5", "--trainer.max_epochs=4", "--report.write=false"]
    assert main(["fit", "--config=adding", *given, f"--runs={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"^Forecaster: [\d,]+ parameters on \w+.*; rnn \(GRU, [\d,]+\), head \(Linear, 33\)", shown, re.M
    )
    lines = re.findall(r"^step (\d+) of 20, ([\d.e+]+) steps/s, (\S+) left(.*)", shown, re.M)
    assert [int(step) for step, *_ in lines] == list(range(1, 21))
    assert all(float(speed) > 0 for _, speed, *_ in lines)
    assert all("train/loss " in rest for step, _, _, rest in lines if int(step) > 4)
    assert lines[-1][2] == "0:00:00"
    assert len(re.findall(r"^step (5|10|15|20) of 20  .*val/rmse", shown, re.M)) == 4


def test_time_left_is_that_of_the_steps_to_come_or_of_max_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    run = SimpleNamespace(estimated_stepping_batches=50, global_step=10, callbacks=[])  # resumed at step 10
    pace = Pace(run)
    assert pace.left(run) is None
    run.global_step, now = 20, 105.0  # two steps a second
    assert pace.left(run) == 15.0
    run.callbacks = [timer := Timer(duration={"seconds": 8})]
    timer._start_time[RunningStage.TRAINING] = 100.0
    assert pace.left(run) == 3.0
    endless = Pace(SimpleNamespace(**{**vars(run), "estimated_stepping_batches": -1, "callbacks": []}))
    assert endless.left(SimpleNamespace(**{**vars(run), "callbacks": []})) is None


def test_sweep_writes_a_sorted_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = ["--config", "adding", *SHORT, f"--runs={tmp_path}", "--data.length=8"]
    grid = ["--grid", "model.stack.hidden_size=4,8", "--grid", "model.optim.lr=0.01"]
    assert main(["sweep", *given, *grid]) == 0
    with open(tmp_path / "adding-sweep.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["model.stack.hidden_size"] for row in rows} == {"4", "8"}
    scores = [float(row["val/rmse"]) for row in rows]
    assert scores == sorted(scores)
    assert "Sweep, best first" in capsys.readouterr().out


def test_compare_shows_runs_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for backend in ("fastrnn", "torch"):
        given = ["--config", "adding", *SHORT, f"--runs={tmp_path}", "--data.length=8"]
        assert main(["fit", *given, f"--name={backend}", f"--model.stack.backend={backend}"]) == 0
    runs = [str(tmp_path / name / "version_0") for name in ("fastrnn", "torch")]
    capsys.readouterr()
    assert main(["compare", *runs, "--metric=rmse", f"--out={tmp_path}/both.png"]) == 0
    shown = capsys.readouterr().out
    assert all(run in shown for run in runs)
    assert re.search(
        r"torch/version_0 beside .*train/rmse is \S+ away on average; it took [\d.]+ times as long", shown
    )
    assert (tmp_path / "both.png").stat().st_size > 1000
    assert main(["compare", str(tmp_path)]) == 2
    assert "has no metrics.csv" in capsys.readouterr().err
