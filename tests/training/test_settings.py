"""Settings that cannot be right are refused by name and value; Lightning's own work or are refused too."""

import csv
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrnn.training import (
    Forecaster,
    GradientFlow,
    InputError,
    JapaneseVowels,
    LabelledData,
    LanguageModel,
    MemoryData,
    Optim,
    SequenceClassifier,
    SeriesData,
    Stack,
    StreamChunks,
    TextData,
)
from fastrnn.training.cli import main, run, with_shipped_configs
from fastrnn.training.run import BestCheckpoint

SERIES = {"mean": [0.0], "scale": [1.0], "outputs": 1, "columns": ["a"], "season": None}
CLASSES = {"mean": [0.0], "scale": [1.0], "classes": ["a", "b"]}
NONE = ((), ())
NAN = math.nan
ADDING = ["fit", "--config=adding", "--data.length=8", "--data.batch_size=4", "--model.stack.hidden_size=4"]
TWO = ["max_steps=2", "max_epochs=-1", "val_check_interval=2", "limit_val_batches=1", "limit_test_batches=1"]
QUIET = ["log_every_n_steps=1", "enable_progress_bar=false", "enable_model_summary=false"]
QUICK = [
    *ADDING,
    *(f"--trainer.{s}" for s in [*TWO, *QUIET]),
    "--flow.every_n_steps=0",
    "--report.write=false",
    "--report.compare=false",
]


@pytest.mark.parametrize(
    ("make", "setting", "values"),
    [
        (Optim, "optim.lr", [-0.1, NAN, math.inf, "0.1", True]),
        (Optim, "optim.weight_decay", [-0.1, NAN]),
        (Optim, "optim.momentum", [-0.1, 1.0]),
        (Optim, "optim.beta2", [-0.1, 1.0]),
        (Optim, "optim.floor", [-0.1, 1.1]),
        (Optim, "optim.warmup", [-1, 2.5]),
        (Optim, "optim.name", ["adamm"]),
        (Optim, "optim.schedule", ["cosin"]),
        (Stack, "stack.hidden_size", [0, -3, 2.5, "4"]),
        (Stack, "stack.num_layers", [0, -1]),
        (Stack, "stack.dropout", [-0.1, 1.1, NAN]),
        (Stack, "stack.proj_size", [-1, 128]),
        (Stack, "stack.forget_bias", [NAN, math.inf]),
        (lambda dropout: LanguageModel({"symbols": 3}, dropout=dropout), "dropout", [-0.1, 1.1, NAN]),
        (lambda embedding_size: LanguageModel({"symbols": 3}, embedding_size=embedding_size),
         "embedding_size", [0, -1]),
        (lambda dropout: Forecaster(SERIES, dropout=dropout), "dropout", [-0.1, 1.1, NAN]),
        (lambda one_step: Forecaster(SERIES, one_step=one_step), "one_step", [-0.1, NAN]),
        (lambda dropout: SequenceClassifier(CLASSES, dropout=dropout), "dropout", [-0.1, 1.1]),
        (lambda noise: SequenceClassifier(CLASSES, noise=noise), "noise", [-0.1, NAN]),
        (lambda label_smoothing: SequenceClassifier(CLASSES, label_smoothing=label_smoothing),
         "label_smoothing", [-0.1, 1.1]),
        (SeriesData, "window", [0, -1, 2.5]),
        (SeriesData, "horizon", [0, -1]),
        (SeriesData, "batch_size", [0, -1]),
        (SeriesData, "season", [0, 105]),
        (SeriesData, "seed", [-1, 2**32]),
        (TextData, "rows", [0, -1]),
        (TextData, "k1", [0, -1]),
        (TextData, "k2", [0, 127]),
        (TextData, "limit", [0, -5]),
        (MemoryData, "length", [1, -1]),
        (MemoryData, "batch_size", [0, -1]),
        (MemoryData, "epoch", [0, -1]),
        (MemoryData, "evaluation", [0, -1]),
        (JapaneseVowels, "held_out", [0, 30]),
        (lambda batch_size: LabelledData(NONE, NONE, NONE, batch_size), "batch_size", [0, -1]),
        (lambda rows: StreamChunks([], rows, 4), "rows", [0, -1]),
        (GradientFlow, "flow.every_n_steps", [-1]),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused_by_name_and_value(
    make: Callable[..., Any], setting: str, values: list[Any]
) -> None:
    for value in values:
        with pytest.raises(InputError) as refusal:
            make(**{setting.rpartition(".")[2]: value})
        assert str(refusal.value).startswith(f"{setting} must be ")
        assert str(refusal.value).endswith(f", got {value!r}")


@pytest.mark.parametrize("data", [SeriesData, TextData])
@pytest.mark.parametrize("shares", [(0.6, 0.6), (0.5, 0.5), (-0.1, 0.1), (NAN, 0.1), (0.1, 1.0), (0.1,), 0.1])
def test_held_out_shares_leave_something_to_train_on(data: type, shares: Any) -> None:
    with pytest.raises(InputError, match="held_out must be"):
        data(held_out=shares)


def test_what_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"columns must hold each entry once, got twice: load"):
        SeriesData("x.csv", columns=["load", "price", "load"])
    twice = [str(tmp_path / "a.txt"), f"{tmp_path}/./a.txt"]
    with pytest.raises(InputError, match=r"paths must hold each entry once, got twice: /"):
        TextData(twice)
    with pytest.raises(InputError, match="paths must name a file"):
        TextData([])


def test_a_text_too_short_to_be_tested_is_refused_before_training(text_file: str) -> None:
    with pytest.raises(InputError, match="test has 0 characters"):
        TextData([text_file], rows=4, held_out=(0.1, 0.0)).batches("train", 0, 1)


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        ({"options": {"batch_first": True}}, "options must not hold batch_first"),
        ({"options": {"dropout": 0.1}}, "options must not hold dropout"),
        ({"options": {"nonsense": 1}}, "unexpected keyword argument 'nonsense'"),
        ({"cell": "gru", "hidden_size": 8, "proj_size": 2}, "proj_size is for lstm alone, got 2 for gru"),
        ({"hidden_size": 10**9}, "the stack cannot be built: RuntimeError"),
    ],
)
def test_a_stack_that_cannot_be_built_says_why(stack: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Stack(**stack).build(3)


def test_a_task_refuses_data_of_another_kind() -> None:
    symbols = {"symbols": 3}
    for task, spec in ((Forecaster, CLASSES), (SequenceClassifier, SERIES), (Forecaster, symbols)):
        with pytest.raises(InputError, match=f"{task.__name__} needs data with mean, scale"):
            task(spec)
    with pytest.raises(InputError, match="needs data with a vocabulary or symbols, not a spec of mean"):
        LanguageModel(SERIES)
    regression = {k: v for k, v in SERIES.items() if k != "columns"}
    with pytest.raises(InputError, match=r"one_step is for series.*got 0\.5"):
        Forecaster(regression, one_step=0.5)


def refusal(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> str:
    """The one line that a refused command says of it."""
    capsys.readouterr()
    assert main([*arguments, f"--runs={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("fastrnn train: ")]
    assert error.endswith(f"{line}\n")
    return line


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.optim.lr=.nan", "optim.lr must be a number in [0, inf), got nan"),
        ("model.optim.lr=fast", "model.optim.lr: Expected a float. Got value: fast"),
        ("data.batch_size=0", "batch_size must be a whole number of at least 1, got 0"),
        ("data.nonsense=1", "Option 'nonsense' is not accepted"),
        ("nonsense=1", "unrecognized arguments: --nonsense=1"),
        ("trainer.precision=17", "trainer.precision: "),
        ("trainer.accelerator=tpu", "torch_xla"),
        ("trainer.accelerator=gpux", "accelerator='gpux'"),
        ("trainer.strategy=nonsense", "strategy='nonsense'"),
        ("trainer.devices=0", "devices"),
        ("trainer.max_epochs=-5", "`max_epochs` must be a non-negative integer or -1"),
        ("trainer.val_check_interval=0", "trainer.val_check_interval must be a number in (0, inf), got 0"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val must be a number in [0, inf), got -1"),
        ("trainer.overfit_batches=-1", "overfit_batches"),
        ("trainer.callbacks=EarlyStopping", "trainer.callbacks"),
        ("trainer.callbacks=LearningRateFinder", "should have one of these fields: ('lr', 'learning_rate')"),
        ("trainer.callbacks=BackboneFinetuning", "has no attribute 'backbone'"),
        ("trainer.logger=Nonsense", "trainer.logger"),
        ("best.mode=up", "`mode` can be min, max but got up"),
        ("best.monitor=val/nothing", "best.monitor must be one of val/loss, val/rmse, val/mae, got 'val/no"),
        ("best.monitor=nothing", "could not find the monitored key"),
        ("seed_everything=-1", "-1 is not in bounds"),
        ("ckpt_path=last", "no checkpoint at last"),
        ("config=addin", "no configuration addin: give a file, or one of adding"),
    ],
)
def test_a_refused_setting_is_one_line_and_status_2(
    setting: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert words in refusal([*QUICK, f"--{setting}"], tmp_path, capsys)


def test_an_early_stopping_without_its_metric_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stopping = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/nothing"]
    assert "which is not available" in refusal([*QUICK, *stopping], tmp_path, capsys)


@pytest.mark.parametrize(
    "settings",
    [
        ["precision=64-true"],
        ["precision=bf16-true"],
        ["precision=16-mixed"],
        ["overfit_batches=2.0", "val_check_interval=1.0", "check_val_every_n_epoch=1"],
        ["fast_dev_run=true"],
        ["enable_checkpointing=false"],
        ["barebones=true", "log_every_n_steps=null", "enable_progress_bar=null", "enable_model_summary=null"],
        ["limit_val_batches=0"],
        ["max_steps=0"],
        ["callbacks=ModelCheckpoint"],
    ],
)
@pytest.mark.filterwarnings("ignore::fastrnn.FallbackWarning")
def test_lightnings_settings_are_usable(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = run(with_shipped_configs([*QUICK, *(f"--trainer.{s}" for s in settings)])).trainer
    steps = {"max_steps=0": 0, "fast_dev_run=true": 1}.get(settings[0], 2)
    assert trained.global_step == steps
    tested = [k for k in trained.callback_metrics if k.startswith("test/")]
    assert bool(tested) == (steps == 2 and settings[0] != "barebones=true")
    unsaved = ("enable_checkpointing=false", "barebones=true", "fast_dev_run=true", "max_steps=0")
    assert bool(list(tmp_path.rglob("last.ckpt"))) == (settings[0] not in unsaved)
    assert {p.name for p in tmp_path.iterdir()} <= {"runs"}  # nothing beside it


def test_a_configuration_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    timer = ["--trainer.callbacks=Timer", "--trainer.callbacks.duration=00:00:10:00"]  # with an Enum inside
    trained = run(with_shipped_configs([*QUICK, *timer, f"--runs={tmp_path}"])).trainer
    assert trained.global_step == 2
    assert "config.yaml: ValueError" in caplog.text
    assert not list(tmp_path.rglob("config.yaml"))


def test_loggers_and_plugins_of_ones_own_stand_beside_the_runs_log(tmp_path: Path) -> None:
    own = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}/own"]
    io = ["--trainer.plugins=lightning.pytorch.plugins.io.TorchCheckpointIO"]
    cli = run(with_shipped_configs([*QUICK, *own, *io, f"--runs={tmp_path}/runs"]))
    for folder in ("own/lightning_logs", "runs/adding"):
        with open(tmp_path / folder / "version_0/metrics.csv", encoding="utf-8") as file:
            assert any(row.get("train/loss") for row in csv.DictReader(file))
    assert type(cli.trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO"


def test_without_a_logger_nothing_is_logged_and_nothing_written_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("mine", encoding="utf-8")
    run(with_shipped_configs([*QUICK, "--trainer.logger=false"]))
    assert not list(tmp_path.rglob("metrics.csv"))
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "config.yaml"}
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == "mine"
    assert (tmp_path / "runs/adding/version_0/checkpoints/last.ckpt").exists()


def test_the_best_checkpoint_is_the_one_of_best_among_others(tmp_path: Path) -> None:
    cli = run(with_shipped_configs([*QUICK, "--trainer.callbacks=ModelCheckpoint", f"--runs={tmp_path}"]))
    assert isinstance(cli.best, BestCheckpoint)
    assert cli.best.best_model_path.endswith("best.ckpt")


@pytest.mark.parametrize(
    "given", [["--config=co2"], ["-c", "co2"], ["--config", "co2"], ["-c=co2"], ["-cco2"]]
)
def test_a_shipped_configuration_is_named_in_every_form(given: list[str]) -> None:
    assert with_shipped_configs(given)[-1].endswith("configs/co2.yaml")


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ("a=1,2", ["1", "2"]),
        ("a=[0.1,0.2],[0.2,0.1]", ["[0.1,0.2]", "[0.2,0.1]"]),
        ("a={cell: gru, options: {b: [1, 2]}}, x", ["{cell: gru, options: {b: [1, 2]}}", "x"]),
        ("a='x,y',\"z,\"", ["'x,y'", '"z,"']),
    ],
)
def test_a_grid_is_parted_at_its_outer_commas(values: str, parts: list[str]) -> None:
    from fastrnn.training.sweep import axes

    assert axes([values]) == {"a": parts}


@pytest.mark.parametrize("grid", [["a"], ["a="], ["a=1,,2"], ["=1"], ["a=1", "a=2"]])
def test_a_grid_that_is_none_is_refused(grid: list[str]) -> None:
    from fastrnn.training.sweep import axes

    with pytest.raises(InputError, match="--grid must"):
        axes(grid)


def sweep(tmp_path: Path, *more: str) -> int:
    return main(["sweep", *QUICK[1:], f"--runs={tmp_path}", *more])


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_failed_combination_is_a_row_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    grid = ["--grid", "model.stack.hidden_size=-3,x,4", "--grid", "data.length=8,1"]
    assert sweep(tmp_path, *grid) == 0
    rows = table(tmp_path / "adding-sweep.csv")
    assert [(r["model.stack.hidden_size"], r["data.length"]) for r in rows if not r["failed"]] == [("4", "8")]
    assert math.isfinite(float(rows[0]["val/rmse"]))
    reasons = [r["failed"] for r in rows[1:]]
    assert sum("hidden_size must be a whole number of at least 1, got -3" in r for r in reasons) == 1
    assert sum("hidden_size: Expected a int. Got value: x" in r for r in reasons) == 2
    assert sum("length must be a whole number of at least 2, got 1" in r for r in reasons) == 2
    assert "got -3" in capsys.readouterr().out


def test_any_error_of_a_combination_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Stack.build

    def sometimes(stack: Stack, input_size: int) -> Any:
        if stack.hidden_size == 5:
            raise MemoryError("no room. None at all")
        return build(stack, input_size)

    monkeypatch.setattr(Stack, "build", sometimes)
    assert sweep(tmp_path, "--grid", "model.stack.hidden_size=5,4") == 0
    rows = table(tmp_path / "adding-sweep.csv")
    assert [(r["model.stack.hidden_size"], r["failed"]) for r in rows] == [
        ("4", ""),
        ("5", "MemoryError: no room"),
    ]


def test_two_sweeps_of_one_name_leave_two_tables(tmp_path: Path) -> None:
    for size in ("4", "5"):
        assert sweep(tmp_path, "--grid", f"model.stack.hidden_size={size}") == 0
    for name, size in (("adding-sweep", "4"), ("adding-sweep-1", "5")):
        assert [r["model.stack.hidden_size"] for r in table(tmp_path / f"{name}.csv")] == [size]


def test_a_sweep_without_any_result_ends_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert sweep(tmp_path, "--grid", "model.stack.hidden_size=4", "--trainer.limit_val_batches=0") == 2
    assert "no combination gave a result: validation chose no checkpoint" in capsys.readouterr().err
    assert sweep(tmp_path, "--grid", "model.nonsense=1") == 2
    assert "Option 'nonsense' is not accepted" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert sweep(tmp_path / "file", "--grid", "model.stack.hidden_size=4") == 2
    assert "cannot write" in capsys.readouterr().err
    for name, words in (
        ("x" * 300, "cannot write .*too long"),
        ("../up", "must be a folder inside .*, got '../up'"),
    ):
        assert sweep(tmp_path / "runs", "--grid", "model.stack.hidden_size=4", f"--name={name}") == 2
        assert re.search(words, capsys.readouterr().err)
    assert not list(tmp_path.glob("up*"))
