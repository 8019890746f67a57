"""Nothing that happens after the last step takes a finished run's results with it."""

import logging
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from conftest import language_model, trainer
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy as Strategy

from fastrnn.training import (
    Forecaster,
    GradientFlow,
    MemoryData,
    Report,
    Stack,
    TextData,
    compare_backends,
    speed,
)
from fastrnn.training.cli import CONFIGS, main
from fastrnn.training.run import RunLog


def fit(task: L.LightningModule, data: Any, folder: Path, report: Report, **settings: Any) -> str:
    """The page of a short run, its test included; nothing where there is none."""
    settings = {
        "max_steps": 3,
        "val_check_interval": 2,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
        **settings,
    }
    run = trainer(folder, report, GradientFlow(2), **settings)
    run.fit(task, datamodule=data)
    run.test(task, datamodule=data, verbose=False)
    return report.path.read_text(encoding="utf-8") if report.path else ""


def broken(*args: Any, **keywords: Any) -> Any:
    raise RuntimeError("out of memory\nat some address")


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("fastrnn.training.report.results", "Results"),
        ("fastrnn.training.plots.curves", "Curves"),
        ("fastrnn.training.plots.heat_map", "Gradient flow"),
        ("fastrnn.training.report.exhibit", "Sample"),
        ("fastrnn.training.language.LanguageModel.exhibits", "exhibits"),
        ("fastrnn.training.report.compare_backends", "speed beside torch.nn"),
        ("fastrnn.training.report.configuration", "Configuration"),
        ("fastrnn.training.report.environment", "Environment"),
        ("fastrnn.training.report.page", "all of it"),
    ],
)
def test_a_part_of_the_report_that_fails_is_one_line_and_the_run_goes_on(
    place: str,
    part: str,
    text: TextData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(place, broken)
    with caplog.at_level(logging.WARNING, logger="fastrnn"):
        page = fit(language_model(text), text, tmp_path, Report())
    said = [r.getMessage() for r in caplog.records if r.name.startswith("fastrnn")]
    assert said == [f"the report goes without: {part} (RuntimeError: out of memory)"]
    assert "test/loss" in (tmp_path / "run/version_0/metrics.csv").read_text(encoding="utf-8")
    if part != "all of it":
        for title in ("Results", "Curves", "Gradient flow", "Speed", "Configuration", "Environment"):
            assert f"<h2>{title}</h2>" in page


@pytest.mark.parametrize(
    "precision",
    ["64-true", "bf16-true", "bf16-mixed", MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))],
)
def test_the_speed_is_measured_in_the_precision_of_the_run(
    precision: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A GRU: torch.nn's LSTM under autocast raises on processors without 16-bit instructions."""
    given = {"plugins": [precision]} if isinstance(precision, Precision) else {"precision": precision}
    data, report = MemoryData("adding", length=8, epoch=4, evaluation=2), Report()
    fit(Forecaster(data.spec, Stack("gru", hidden_size=8)), data, tmp_path, report, **given)
    assert report.speed["speedup"] > 0.0
    assert not [r for r in caplog.records if r.name.startswith("fastrnn")]


def test_the_speed_is_measured_where_the_run_trained(
    text: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer hands the task back on the CPU while the batches stay on its device."""
    seen = []

    def step(task: Any, batch: Any, precision: Precision) -> float:
        seen.append({task.device, batch.x.device, batch.y.device, *(p.device for p in task.parameters())})
        return 1.0

    monkeypatch.setattr(speed, "timed_step", step)
    monkeypatch.setattr(Strategy, "root_device", torch.device("meta"))
    report = Report()
    report._batch = text.batches("train", 0, 1).batch(0, 0)
    report.on_fit_end(trainer(tmp_path, fast_dev_run=True), language_model(text))
    assert seen == [{torch.device("meta")}] * 12
    seen.clear()
    compare_backends(language_model(text), report._batch, rounds=1)
    assert seen == [{torch.device("cpu")}] * 4


@pytest.mark.parametrize("policy", ["raise", "ignore"])
def test_a_run_that_diverges_ends_with_its_report(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = ["fit", "--config", "adding", "--data.length=8", "--data.epoch=20", "--data.evaluation=2"]
    given += ["--model.optim.lr=1e30", "--model.optim.name=sgd", "--model.stack.cell=rnn_relu"]
    given += ["--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false", f"--runs={tmp_path}"]
    status = main([*given, "--trainer.max_epochs=2", f"--clipping={{norm: null, nonfinite: {policy}}}"])
    shown = capsys.readouterr()
    page = (tmp_path / "adding/version_0/report.html").read_text(encoding="utf-8")
    assert "<h2>Curves</h2>" in page
    assert f"report: {tmp_path}/adding/version_0/report.html" in shown.out
    if policy == "raise":
        assert status == 1
        assert "fastrnn train: the training diverged: gradient is not finite at step" in shown.err
        assert "Traceback" not in shown.err
    else:
        assert status == 0


def test_shipped_configurations_leave_the_accelerator_to_lightning() -> None:
    for path in CONFIGS.glob("*.yaml"):
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))["trainer"]
        assert settings.get("accelerator", "auto") == "auto", path.name
        assert settings["devices"] == 1


@pytest.mark.parametrize("name", ["..", "../up", "a/../../up", "/absolute", "x" * 300, "below"])
def test_a_folder_that_cannot_be_made_is_one_line_before_training(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/below").write_text("a file", encoding="utf-8")
    given = ["fit", "--config", "adding", "--data.length=8", "--trainer.max_epochs=1000"]
    assert main([*given, f"--name={name}", f"--runs={tmp_path}/runs"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    assert capsys.readouterr().err.splitlines()[-1].startswith("fastrnn train: ")


@pytest.mark.parametrize("runs", ["file", "file/below", "/proc/nowhere", "/dev/null/x"])
def test_runs_that_are_no_folder_are_one_line_before_training(
    runs: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file", encoding="utf-8")
    given = ["fit", "--config", "adding", "--data.length=8", "--trainer.max_epochs=1000"]
    assert main([*given, f"--runs={runs}"]) == 2
    assert f"cannot write into {runs}/adding: " in capsys.readouterr().err


def test_a_tilde_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave it in ``--runs=~/x``; some of Lightning's writers take it for the home, some do not."""
    (home := tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    (home / "t.txt").write_text("abc " * 200)
    quick = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--report.write=false"]
    small = ["--data.paths=[~/t.txt]", "--data.rows=2", "--data.k1=8", "--model.stack.hidden_size=4"]
    assert main(["fit", "--config", "shakespeare", *small, *quick, "--runs=~/runs", "--name=r"]) == 0
    assert (home / "runs/r/version_0/checkpoints/best.ckpt").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"home"}


def test_logs_of_one_moment_have_folders_of_their_own(tmp_path: Path) -> None:
    logs = [RunLog(str(tmp_path), "same") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda log: log.log_dir, logs))
    assert len(folders) == 8


LOCALES = {
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII output": {"PYTHONIOENCODING": "ascii"},
}


@pytest.mark.parametrize("locale", LOCALES)
def test_a_run_with_umlauts_in_text_paths_and_name_ends_in_any_locale(locale: str, tmp_path: Path) -> None:
    (tmp_path / "grün 文").mkdir()
    text = "".join(f"ligne {i}: déjà vu, über, 文字\n" for i in range(300))
    (tmp_path / "grün 文/a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "ü.yaml").write_text("# größe, 文\nname: plain", encoding="utf-8")
    given = ["fit", "--config", "shakespeare", "--config", "ü.yaml", "--data.paths=['grün 文/a.txt']"]
    given += ["--data.rows=4", "--data.k1=16", "--model.stack.hidden_size=8", "--model.sampling.length=20"]
    given += ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--report.compare=false"]
    given += ["--runs=läufe", "--name=größe"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **LOCALES[locale]}
    command = [sys.executable, "-m", "fastrnn", "train", *given]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "läufe/größe/version_0/report.html").read_text(encoding="utf-8")
    assert "<h2>Sample</h2>" in page


def test_a_name_that_the_locale_cannot_spell_is_one_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastrnn.training.cli.run", lambda argv: "文.txt".encode("latin-1"))
    assert main(["fit"]) == 2
    assert capsys.readouterr().err == "fastrnn train: '\\u6587.txt' is no name of a file in this locale\n"


def test_a_reader_who_leaves_and_streams_that_are_closed_do_not_end_a_run(tmp_path: Path) -> None:
    given = "fit --config adding --data.length=8 --data.epoch=4 --data.evaluation=2 --trainer.max_epochs=3"
    start = f"{shlex.quote(sys.executable)} -m fastrnn train {given} --report.compare=false"
    for name, end in {"pipe": "| grep --max-count=1 ^step", "closed": ">&- 2>&-"}.items():
        line = f"set -o pipefail; {start} --name={name} {end}"
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"runs/{name}/version_0/report.html").exists()
