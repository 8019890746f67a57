"""How fast training runs: symbols per second, alone and beside the same model on torch.nn."""

import time
from dataclasses import replace
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import rank_zero_info

from fastrnn._load import Load
from fastrnn.training.tasks import SequenceTask, is_logged


class Throughput(L.Callback):
    """Logs ``speed/tokens_per_s`` and ``speed/seconds`` of the training steps alone.

    The device's work counts too: the host waits for it where the figures are logged, and before a validation.
    A run that begins while others use its cores says that it is slower for it.
    """

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._started = 0.0
        self._load = Load()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = self._load.against(torch.get_num_threads()) if trainer.world_size == 1 else ""
        if found:
            rank_zero_info(f"this machine is busy: {found}, and training is slower for it")

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        logs = is_logged(trainer)
        now = synchronized(pl_module.device) if logs else time.perf_counter()
        self.seconds += now - self._started
        self.tokens += batch.tokens * trainer.world_size
        if logs:
            pl_module.log("speed/tokens_per_s", self.tokens / self.seconds)
            trainer.progress_bar_metrics["speed/tokens_per_s"] = self.tokens / self.seconds
            pl_module.log("speed/seconds", self.seconds)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        start = time.perf_counter()
        if trainer.training or trainer.validating:
            self.seconds += synchronized(pl_module.device) - start


def compare_backends(
    task: SequenceTask,
    batch: Any,
    rounds: int = 5,
    device: torch.device | None = None,
    precision: Precision | None = None,
) -> dict[str, float]:
    """Training speed of a task as it is and with torch.nn's recurrent module, on one batch.

    The two alternate in this process, forward, backward and optimizer step, so that what else the
    machine does meets both.

    Args:
        task: trained or not; it stays where it is, and as it is.
        batch: of the task's data module.
        rounds: steps of each, after one of warm-up.
        device: to measure on, the task's own when left out; a trainer hands a task back on the CPU.
        precision: of the trainer, whose autocast the steps run under.

    Returns:
        ``tokens_per_s`` and ``torch_tokens_per_s`` from the median step, and the median of the
        paired ratios, ``speedup``.
    """
    device, precision = device or task.device, precision or Precision()
    batch = task.transfer_batch_to_device(batch, device, 0)
    models = {"here": copy_of(task, task.stack.backend, device), "torch": copy_of(task, "torch", device)}
    seconds: dict[str, list[float]] = {"here": [], "torch": []}
    for round_ in range(rounds + 1):
        for name, model in models.items():
            elapsed = timed_step(model, batch, precision)
            if round_:  # the first is a warm-up
                seconds[name].append(elapsed)
    ratios = [t / h for t, h in zip(seconds["torch"], seconds["here"], strict=True)]
    return {
        "tokens_per_s": batch.tokens / median(seconds["here"]),
        "torch_tokens_per_s": batch.tokens / median(seconds["torch"]),
        "speedup": median(ratios),
    }


def copy_of(task: SequenceTask, backend: str, device: torch.device) -> SequenceTask:
    """The same task and weights with the recurrent module of another library, to train."""
    twin = type(task)(**{**task.hparams, "stack": replace(task.stack, backend=backend)})
    twin.load_state_dict(task.state_dict())
    return twin.to(device, next(task.parameters()).dtype).train()


def timed_step(task: SequenceTask, batch: Any, precision: Precision) -> float:
    """Seconds of one training step, gradients thrown away after it."""
    optimizer = task.optim.optimizer(task.parameters())
    start = synchronized(task.device)
    with precision.forward_context():
        loss = task.loss_of(batch)
    loss.backward()
    optimizer.step()
    elapsed = synchronized(task.device) - start
    optimizer.zero_grad()
    return elapsed


def synchronized(device: torch.device) -> float:
    """The time at which all work that the device was given is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
