"""The base of the three tasks: optimizer and schedule, hyper-parameters, checks of checkpoints."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from torch import Tensor

from fastrnn.training.errors import InputError
from fastrnn.training.optim import Optim, is_fused
from fastrnn.training.stack import Stack


def is_logged(trainer: L.Trainer) -> bool:
    """Whether the values of this training step are logged: Lightning's loggers take them, or an epoch ends.

    At every other step nothing is logged and no value is read: a call of ``log`` takes the host some 50 us,
    and reading a value waits until the device has done all its work.
    """
    last = trainer.is_last_batch or trainer.fast_dev_run  # type: ignore[attr-defined]
    return trainer._logger_connector.should_update_logs or bool(last)


FREE = {"backend", "dropout", "forget_bias"}  # of a stack: may differ between a checkpoint and its reader
ITS_STATE = ("optim.name", "optim.decay_all")  # decide what the optimizer's state in a checkpoint means


class SequenceTask(L.LightningModule):
    """A model over a recurrent stack with its loss and metrics.

    Args:
        spec: what the model must know of the data (sizes, vocabulary, classes, scale): the ``spec``
            of the data module; it is saved with the model, so that a checkpoint stands alone.
        stack: the recurrent module.
        optim: optimizer and schedule.

    Between ``training_step`` and its back-propagation, ``end_loss`` gives the part of the loss that
    stands at the last time step alone, or is None if all of it does, or none of it can.

    Training that goes on from a checkpoint uses the settings given now, and says which of them differ.

    Raises:
        InputError: ``spec`` lacks what the task needs; or, on loading, the checkpoint is of another
            structure, or of another optimizer while training is to go on.
    """

    needs: tuple[str, ...] = ()  # keys of spec
    fixed: tuple[str, ...] = ()  # hyper-parameters without which the trained weights mean nothing

    end_loss: Callable[[], Tensor] | None = None

    def __init__(self, spec: dict[str, Any], stack: Stack | None, optim: Optim | None) -> None:
        super().__init__()
        self.spec = spec
        self.stack = Stack(**stack) if isinstance(stack, dict) else stack or Stack()
        self.optim = Optim(**optim) if isinstance(optim, dict) else optim or Optim()
        self._resumed: dict[str, tuple[Any, Any]] | None = None  # setting -> (in the checkpoint, here)
        if not set(self.needs) <= spec.keys():
            raise InputError(
                f"{type(self).__name__} needs data with {', '.join(self.needs)}; "
                f"this data's spec has {', '.join(spec) or 'nothing'}"
            )

    @property
    def logs(self) -> bool:
        """Whether the values of this step are logged."""
        return self._trainer is None or is_logged(self._trainer)

    def show(self, name: str, value: Tensor, **given: Any) -> None:
        """``log`` of a training step with the value in the progress bar too.

        There as a number, which waits for the device once: a tensor that was logged with ``prog_bar``
        Lightning 2.6 reads at every batch, until the next one is logged.
        """
        self.log(name, value, **given)
        if self._trainer is not None:
            self.trainer.progress_bar_metrics[name] = float(value)

    def loss_of(self, batch: Any) -> Tensor:
        """The training loss of a batch; nothing is changed by it."""
        raise NotImplementedError

    def on_after_backward(self) -> None:
        self.end_loss = None

    def exhibits(self) -> Iterator[tuple[str, Figure | str]]:
        """Titled pictures and texts for the report, from the last evaluation."""
        return iter(())

    def configure_optimizers(self) -> Any:
        # A GradScaler unscales gradients before they are clipped, which fused optimizers leave no time for.
        fused = getattr(self.trainer, "scaler", None) is None
        optimizer = self.optim.optimizer(self.parameters(), fused)
        total = self.trainer.estimated_stepping_batches
        scheduler = self.optim.scheduler(optimizer, total)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def structure(self) -> dict[str, Any]:
        """What a checkpoint must share with the model that reads it."""
        stack = {f"stack.{k}": v for k, v in asdict(self.stack).items() if k not in FREE}
        return {
            "task": type(self).__name__,
            **stack,
            **{k: self.hparams.get(k) for k in self.fixed},
            **{f"data.{k}": v for k, v in self.spec.items()},
        }

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters, by their names on the command line, and the precision."""
        own = plain({k: v for k, v in self.hparams.items() if k not in ("spec", "stack", "optim")})
        for name, group in (("stack", self.stack), ("optim", self.optim)):
            own |= {f"{name}.{k}": v for k, v in asdict(group).items()}
        return own | {"precision": self.trainer.precision}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["structure"] = self.structure()
        checkpoint["settings"] = self.settings()
        checkpoint["hyper_parameters"] = plain(checkpoint.get("hyper_parameters", {}))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "structure" not in checkpoint:
            raise InputError("the checkpoint is not of one of fastrnn.training's tasks")
        saved, here = checkpoint["structure"], self.structure()
        differing = [k for k in here if saved.get(k) != here[k]]
        if differing:
            each = "; ".join(f"{k} is {short(saved.get(k))} there, {short(here[k])} here" for k in differing)
            raise InputError(f"the checkpoint is of another configuration: {each}")
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._compare_settings(checkpoint)

    def _compare_settings(self, checkpoint: dict[str, Any]) -> None:
        if not checkpoint.get("optimizer_states"):
            raise InputError("training cannot go on from this checkpoint: it holds no state of an optimizer")
        saved = checkpoint.get("settings", {})
        self._resumed = {k: (saved[k], v) for k, v in self.settings().items() if k in saved and saved[k] != v}
        if other := [k for k in ITS_STATE if k in self._resumed]:
            each = "; ".join(f"{k} is {self._resumed[k][0]} there, {self._resumed[k][1]} here" for k in other)
            raise InputError(f"the checkpoint's optimizer is another one: {each}")

    def on_train_start(self) -> None:
        if self._resumed is None:
            return
        if type(self).configure_optimizers is SequenceTask.configure_optimizers:
            self._renew_optimizer()
        changed = {k: f"{k}={now} ({before} until now)" for k, (before, now) in self._resumed.items()}
        if idle := changed.pop("stack.forget_bias", None):
            rank_zero_info(f"{idle} has no effect: the biases are the checkpoint's")
        if changed:
            step = self.trainer.global_step
            rank_zero_info(f"going on from step {step} with {', '.join(changed.values())}")
        self._resumed = None

    def _renew_optimizer(self) -> None:
        """Give the optimizer this configuration's numbers, where its state came with the checkpoint's."""
        (optimizer,), (schedule,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        given = self.optim.optimizer(self.parameters(), is_fused(optimizer)).param_groups
        factor = self.optim.factor(schedule.scheduler.last_epoch, self.trainer.estimated_stepping_batches)
        for group, new in zip(optimizer.param_groups, given, strict=True):
            group.update({k: v for k, v in new.items() if k != "params"})
            group.update(initial_lr=self.optim.lr, lr=self.optim.lr * factor)
        for p, state in optimizer.state.items():  # a fused optimizer counts its steps on the device
            if "step" in state:
                state["step"] = state["step"].to(p.device if is_fused(optimizer) else "cpu")
        schedule.scheduler.base_lrs = [self.optim.lr] * len(given)
        schedule.scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values with dataclasses turned into dictionaries, as checkpoints keep them."""
    return {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in values.items()}


def short(value: Any) -> str:
    """A value in an error message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
