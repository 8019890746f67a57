"""Two processes: the same gradients as one, and each keeps the state of its own rows."""

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import TEXT, trainer

from fastrnn.training import (
    Forecaster,
    InputError,
    JapaneseVowels,
    LanguageModel,
    MemoryData,
    Optim,
    SequenceClassifier,
    Stack,
    TextData,
)


class Keep(L.Callback):
    """Writes every step's gradients, and the carried state of each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:  # type: ignore
        grads = {n: p.grad.clone() for n, p in pl_module.named_parameters()}
        if trainer.is_global_zero:
            torch.save(grads, self.folder / f"grads{trainer.global_step}.pt")

    def on_train_end(self, trainer, pl_module) -> None:  # type: ignore
        if hasattr(pl_module, "carriers"):
            state = pl_module.carriers["train"].state
            torch.save(state, self.folder / f"state{trainer.global_rank}.pt")


def task_and_data(name: str, folder: Path) -> tuple[L.LightningModule, L.LightningDataModule]:
    torch.manual_seed(3)
    stack, optim = Stack(hidden_size=12), Optim(lr=0.01)
    if name == "text":
        halves = [str(folder / name) for name in ("text.txt", "more.txt")]
        for half in halves:  # two documents: a reset in one process's rows
            Path(half).write_text(TEXT, encoding="utf-8")
        text = TextData(halves, rows=4, k1=16, k2=20)
        return LanguageModel(text.spec, stack, optim, embedding_size=8), text
    if name == "vowels":
        vowels = JapaneseVowels(batch_size=31)  # odd: the processes' parts differ in size
        return SequenceClassifier(vowels.spec, stack, optim), vowels
    adding = MemoryData("adding", length=10, batch_size=6, epoch=5, evaluation=1)
    return Forecaster(adding.spec, stack, optim), adding


def fit(name: str, parent: Path) -> None:
    """Four steps in one process, in parent/one, and in two, in parent/two."""
    for folder, parallel in (("one", {}), ("two", {"strategy": "ddp_fork", "devices": 2})):
        (parent / folder).mkdir()
        task, data = task_and_data(name, parent)
        settings = {"max_steps": 4, "limit_val_batches": 1, **parallel}
        trainer(parent / folder, Keep(parent / folder), **settings).fit(task, datamodule=data)


@pytest.mark.parametrize("name", ["text", "vowels", "adding"])
def test_two_gloo_processes_have_the_gradients_of_one(name: str, tmp_path: Path) -> None:
    # A process of its own: torch refuses back-propagation after a fork of one that has used a device.
    subprocess.run([sys.executable, __file__, name, str(tmp_path)], check=True, timeout=300)
    folders = [tmp_path / "one", tmp_path / "two"]
    for step in range(4):
        one, two = (torch.load(f / f"grads{step}.pt", weights_only=True) for f in folders)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, atol=1e-5, rtol=1e-4)
    if name == "text":
        whole = torch.load(folders[0] / "state0.pt", weights_only=True)
        parts = [torch.load(folders[1] / f"state{rank}.pt", weights_only=True) for rank in (0, 1)]
        for w, a, b in zip(whole, *parts, strict=True):
            torch.testing.assert_close(torch.cat([a, b], dim=1), w, atol=1e-5, rtol=1e-4)


def test_rows_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    _, text = task_and_data("text", tmp_path)
    with pytest.raises(InputError, match="rows must be divisible by the 3 processes, got 4"):
        text.batches("train", 0, 3)


def test_the_command_line_trains_tests_and_reports_with_two_processes(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    settings = "--trainer.strategy=ddp --trainer.devices=2 --trainer.max_steps=4 --data.rows=4"
    given = f"--runs={tmp_path} --data.paths=['{tmp_path}/text.txt'] --data.k1=16 {settings}"
    command = [sys.executable, "-m", "fastrnn", "train", "fit", "--config", "shakespeare"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *given.split(), "--trainer.val_check_interval=2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    assert (tmp_path / "shakespeare/version_0/report.html").exists()


if __name__ == "__main__":
    fit(sys.argv[1], Path(sys.argv[2]))
