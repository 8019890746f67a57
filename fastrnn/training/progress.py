"""What a run prints while it trains: its model in one line, and how far it is, with the time left."""

import math
import os
import sys
import time
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, RichProgressBar, Timer
from lightning.pytorch.utilities import rank_zero_only

EVERY = 10.0  # seconds from one line to the next, or a hundredth of a run that takes longer than 1,000
Metrics = dict[str, Any]


@rank_zero_only
def say(line: str) -> None:
    """Print a line; a reader who has left (a closed pipe, a lost terminal) does not end the run."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Pace:
    """The steps of a run, their speed since it began, and the seconds that it still takes at this speed."""

    def __init__(self, trainer: L.Trainer) -> None:
        total = trainer.estimated_stepping_batches  # inf or -1: the run has no last step
        self.total = int(total) if 0 < total < math.inf else None
        self.first, self.started = trainer.global_step, time.monotonic()

    def left(self, trainer: L.Trainer) -> float | None:
        """Validations so far are in the speed; a run with ``max_time`` ends there."""
        timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
        bounds = [rest for timer in timers if (rest := timer.time_remaining()) is not None]
        done = trainer.global_step - self.first
        if self.total is not None and done:
            bounds.append((self.total - trainer.global_step) * (time.monotonic() - self.started) / done)
        return max(0.0, min(bounds)) if bounds else None


def clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Lines(ProgressBar):
    """The progress of a run where there is no terminal: a line every ``EVERY`` seconds and at validations."""

    def disable(self) -> None:
        """Lightning's call in all processes but the first, which alone prints."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pace = Pace(trainer)
        self._spoken, self._step = self.pace.started, trainer.global_step
        self._due = self._spoken + EVERY

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        now = time.monotonic()
        if now < self._due or not trainer.is_global_zero:
            return
        speed = (trainer.global_step - self._step) / (now - self._spoken)
        left = self.pace.left(trainer)
        words = [f"{speed:.3g} steps/s", *([f"{clock(left)} left"] if left is not None else [])]
        metrics = self.get_metrics(trainer, pl_module)
        self._say(trainer, words, {k: v for k, v in metrics.items() if not k.startswith("val/")})
        self._spoken, self._step = now, trainer.global_step
        self._due = now + max(EVERY, 0.01 * (now - self.pace.started + (left or 0.0)))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.is_global_zero:
            self._say(trainer, [], self.get_metrics(trainer, pl_module))

    def _say(self, trainer: L.Trainer, words: list[str], metrics: Metrics) -> None:
        pace = getattr(self, "pace", None)  # a validation without training has none
        of = f" of {pace.total}" if pace and pace.total else ""
        values = [f"{k} {v:.5g}" for k, v in metrics.items() if k != "v_num"]
        say("  ".join([", ".join([f"step {trainer.global_step}{of}", *words]), *values]))


class Bar(RichProgressBar):
    """The progress bar of a terminal: each epoch's, and beside it the time left of the whole run."""

    pace: Pace | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.pace = Pace(trainer)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Metrics:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        left = self.pace.left(trainer) if self.pace else None
        return metrics if left is None else {"run left": clock(left), **metrics}

    def _get_train_description(self, current_epoch: int) -> str:
        """Without Lightning's "0/-2" of a run whose length is given in steps."""
        return super()._get_train_description(current_epoch).removesuffix("/-2")


class Summary(ModelSummary):
    """One line: the parts that have parameters, how many, and where they are trained."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parts = {f"{name} ({type(part).__name__}": count(part) for name, part in pl_module.named_children()}
        shown = ", ".join(f"{name}, {n:,})" for name, n in parts.items() if n)
        device = trainer.strategy.root_device
        threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        total = f"{count(pl_module):,} parameters on {device}{threads}"
        say(f"{type(pl_module).__name__}: {total}; {shown}")


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
