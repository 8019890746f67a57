"""Stopping and going on: the same weights as without a stop, whatever the stop was."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from conftest import TEXT, language_model, trainer

from fastrnn.training import GradientFlow, InputError, LanguageModel, Stack, TextData
from fastrnn.training.run import AtomicCheckpoints, Interrupted, Interrupts, LastCheckpoint


@pytest.mark.parametrize("backend", ["fastrnn", "torch"])
@pytest.mark.parametrize(("rows", "stop"), [(4, 5), (4, 7), (16, 17), (16, 18), (16, 20)])
def test_resuming_in_mid_epoch_is_bit_for_bit(
    text: TextData, tmp_path: Path, backend: str, rows: int, stop: int
) -> None:
    """An epoch has 71 or 18 chunks; dropout, schedule, momenta and hidden state all matter."""
    text = TextData(text.paths, rows=rows, k1=16)
    whole = language_model(text, backend)
    run = trainer(tmp_path, GradientFlow(4), max_steps=23, val_check_interval=7)
    run.fit(whole, datamodule=text)

    first = language_model(text, backend)
    # The schedule needs the whole run's length, so the run is stopped from outside.
    run = trainer(tmp_path, Stopper(stop), max_steps=23, val_check_interval=7)
    run.fit(first, datamodule=text)
    run.save_checkpoint(tmp_path / "stopped.ckpt")

    torch.manual_seed(99)
    second = language_model(TextData(text.paths, rows=rows, k1=16), backend)
    run = trainer(tmp_path, GradientFlow(4), max_steps=23, val_check_interval=7)
    run.fit(second, datamodule=text, ckpt_path=tmp_path / "stopped.ckpt")
    assert run.global_step == 23
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    for a, b in zip(whole.carriers["train"].state, second.carriers["train"].state, strict=True):
        assert torch.equal(a, b)


class Stopper(L.Callback):
    """Ends the run after a step, as an interrupt would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == self.step:
            trainer.should_stop = True


class Killer(L.Callback):
    """Sends this process signals from inside a hook, the given time that it is called."""

    def __init__(self, hook: str, call: int, *signals: int) -> None:
        self.left = call

        def send(*args: object) -> None:
            self.left -= 1
            if self.left == 0:
                for signum in signals:
                    os.kill(os.getpid(), signum)

        setattr(self, hook, send)


INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("hook", "call", "kept", "signals"),
    [
        ("on_train_batch_start", 1, 1, [INT]),
        ("on_train_batch_start", 6, 6, [INT, INT, INT]),
        ("on_before_optimizer_step", 7, 7, [TERM]),  # a validation is due after this step
        ("on_before_optimizer_step", 36, 36, [INT]),  # the epoch ends with this step
        ("on_validation_batch_start", 3, 7, [INT, INT]),  # two were the sanity check's
        ("on_validation_batch_start", 6, 14, [TERM, INT]),
        ("on_validation_end", 2, 8, [INT]),
        ("on_train_epoch_end", 1, 37, [INT]),
        ("on_train_epoch_start", 2, 37, [TERM]),
        ("on_before_optimizer_step", 45, 45, [INT]),  # the last
    ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(
    text: TextData, tmp_path: Path, hook: str, call: int, kept: int, signals: list[int]
) -> None:
    """36 chunks an epoch, a validation of two after every seventh step."""

    def run(name: str, *callbacks: L.Callback, **more: object) -> tuple[LanguageModel, L.Trainer]:
        data = TextData(text.paths, rows=8, k1=16)
        model = language_model(data)
        settings = {"max_steps": 45, "val_check_interval": 7, "enable_checkpointing": True}
        settings |= {"num_sanity_val_steps": 2}
        last = LastCheckpoint(10**6)
        fit = trainer(tmp_path / name, *callbacks, last, **settings)
        fit.fit(model, datamodule=data, **more)
        return model, fit

    whole, expected = run("whole")
    with pytest.raises(Interrupted) as stop, Interrupts() as interrupts:
        run("stopped", interrupts, Killer(hook, call, *signals))
    assert stop.value.code == 128 + signals[0]
    path = tmp_path / "stopped/run/version_0/checkpoints/last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == kept
    resumed, found = run("resumed", ckpt_path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for key in ("val/loss", "train/loss"):
        curves = [{r["step"]: r[key] for r in t.logger.rows if key in r} for t in (expected, found)]
        unlogged = {kept - 1} if key == "train/loss" else set()  # the step that was saved before its row
        assert curves[0].keys() - curves[1].keys() <= unlogged
        assert all(curves[0][step] == value for step, value in curves[1].items())


def test_a_signal_during_the_sanity_check_ends_the_run_without_a_checkpoint(
    text: TextData, tmp_path: Path
) -> None:
    killer = Killer("on_validation_batch_start", 1, signal.SIGINT)
    interrupts = Interrupts()
    settings = {"max_steps": 3, "num_sanity_val_steps": 2, "enable_checkpointing": True}
    run = trainer(tmp_path, interrupts, killer, LastCheckpoint(), **settings)
    with pytest.raises(Interrupted), interrupts:
        run.fit(language_model(text), datamodule=text)
    assert run.global_step == 0
    assert not list(tmp_path.rglob("*.ckpt"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_step_that_does_not_end_is_broken_off_by_a_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    with Interrupts() as interrupts:
        interrupts.on_train_start(None, None)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr("fastrnn.training.run.PATIENCE", 0.0)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    settings = {
        "name": "killed",
        "runs": str(tmp_path / "runs"),
        "seed_everything": 1,
        "model": {
            "class_path": "fastrnn.training.LanguageModel",
            "init_args": {"stack": {"hidden_size": 16}, "embedding_size": 8, "dropout": 0.1},
        },
        "data": {
            "class_path": "fastrnn.training.TextData",
            "init_args": {"paths": [str(tmp_path / "text.txt")], "rows": 4, "k1": 16},
        },
        "last": {"every_n_train_steps": 5},
        "trainer": {"max_steps": 250, "accelerator": "cpu", "enable_progress_bar": False},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def command(config: Path, *more: str, **settings: object) -> subprocess.Popen:
    arguments = ["-m", "fastrnn", "train", "fit", "--config", str(config), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    settings = {"stdout": subprocess.DEVNULL, **settings}
    return subprocess.Popen([sys.executable, *arguments], env=environment, **settings)


def final_weights(config: Path, version: int) -> dict[str, torch.Tensor]:
    path = config.parent / f"runs/killed/version_{version}/checkpoints/last.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


def test_kill_9_and_resume_end_with_the_same_weights(config: Path) -> None:
    victim = command(config)
    last = config.parent / "runs/killed/version_0/checkpoints/last.ckpt"
    while not last.exists():
        assert victim.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    time.sleep(torch.rand(()).item())
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert command(config, "--ckpt_path", str(last)).wait() == 0
    assert command(config).wait() == 0
    resumed, uninterrupted = final_weights(config, 1), final_weights(config, 2)
    for name, value in uninterrupted.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("signals", [[INT, INT], [TERM]])
def test_the_last_line_of_an_interrupted_run_is_the_command_that_goes_on(
    config: Path, signals: list[int]
) -> None:
    victim = command(config, "--last.every_n_train_steps=1000", stdout=subprocess.PIPE, text=True)
    while not list(config.parent.glob("runs/killed/version_0/metrics.csv")):
        assert victim.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.02)
    for signum in signals:
        victim.send_signal(signum)
        time.sleep(0.1)
    lines = victim.communicate()[0].splitlines()
    assert victim.returncode == 128 + signals[0]
    assert re.fullmatch(r"interrupted, step \d+ is kept; to go on:", lines[-2])
    ended = subprocess.run(lines[-1], shell=True, check=False, cwd=config.parent, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    last = config.parent / "runs/killed/version_1/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 250


def checkpoint_of(size: int) -> dict[str, Any]:
    return {"state_dict": {"w": torch.ones(size)}, "pytorch-lightning_version": "2.6"}


def test_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint(checkpoint_of(10), path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*last\.ckpt.* are intact"):
            AtomicCheckpoints().save_checkpoint(checkpoint_of(10**6), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert AtomicCheckpoints().load_checkpoint(path)["state_dict"]["w"].sum() == 10
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_damaged_and_absent_checkpoints_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    AtomicCheckpoints().save_checkpoint(checkpoint_of(1000), path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"half\.ckpt is not a readable checkpoint"):
        AtomicCheckpoints().load_checkpoint(path)
    with pytest.raises(InputError, match="no checkpoint at"):
        AtomicCheckpoints().load_checkpoint(tmp_path / "none.ckpt")


def test_a_checkpoint_of_another_configuration_is_refused_with_the_difference(
    text: TextData, tmp_path: Path
) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.fit(language_model(text), datamodule=text)
    run.save_checkpoint(tmp_path / "one.ckpt")
    other = LanguageModel(text.spec, Stack(hidden_size=24, num_layers=2))
    with pytest.raises(InputError, match=r"stack\.hidden_size is 16 there, 24 here"):
        trainer(tmp_path, max_steps=2).fit(other, datamodule=text, ckpt_path=tmp_path / "one.ckpt")


def test_a_checkpoint_alone_gives_the_model_back(text: TextData, tmp_path: Path) -> None:
    model = language_model(text)
    run = trainer(tmp_path, max_steps=2)
    run.fit(model, datamodule=text)
    run.save_checkpoint(tmp_path / "one.ckpt")
    again = LanguageModel.load_from_checkpoint(tmp_path / "one.ckpt")
    assert again.generate("line", 40) == model.generate("line", 40)
