"""Between two steps that are logged, the host never waits for the device, and nothing is logged."""

from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
from strict_device import STRICT, strict_device, waits

from fastrnn.training.cli import CONFIGS, main

SMALL = {
    "adding": ["--data.length=8"],
    "copy": ["--data.length=3"],
    "parity": ["--data.length=6"],
    "shakespeare": ["--data.k1=4", "--trainer.val_check_interval=5"],
    "japanese_vowels": ["--data.batch_size=15"],
    "co2": ["--data.window=20", "--data.season=20", "--data.horizon=3"],
    "sunspots": ["--data.window=20", "--data.season=20", "--data.horizon=3"],
}


class Steps(L.Callback):
    """Waits and calls of ``log`` from the end of one training step to the end of the next."""

    seen: ClassVar[dict[int, list[str]]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        log = pl_module.log

        def recorded(name: str, *args: Any, **kwargs: Any) -> None:
            waits.append(f"log {name}")
            log(name, *args, **kwargs)

        pl_module.log = recorded  # type: ignore[method-assign]

    def on_train_start(self, *args: Any) -> None:
        self.seen.clear()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.seen[trainer.global_step] = list(waits)
        waits.clear()


def test_every_shipped_configuration_is_here() -> None:
    assert sorted(SMALL) == sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", SMALL)
def test_no_step_between_two_logged_ones_waits_or_logs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["fit", "--config", name, *SMALL[name], *STRICT, f"--runs={tmp_path}", "--report.write=false"]
    given += ["--trainer.limit_train_batches=12", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=5"]
    given += ["--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]
    given += ["--flow.every_n_steps=20", "--trainer.callbacks+=strict_no_waiting.Steps"]
    with strict_device(monkeypatch):
        assert main(given) == 0
    unlogged = {step: seen for step, seen in Steps.seen.items() if step in (2, 3, 4, 7, 8, 9)}
    assert unlogged == {step: [] for step in (2, 3, 4, 7, 8, 9)}
    # What is looked for would be seen: the steps that are logged wait.
    assert "log gradient/norm" in Steps.seen[5]
    assert any(seen.startswith("tolist clipping.py") for seen in Steps.seen[5])
