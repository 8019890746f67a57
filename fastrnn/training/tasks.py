"""What the three tasks share: optimizer and schedule, hyper-parameters, checks of checkpoints."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from typing import Any

import lightning as L
from matplotlib.figure import Figure
from torch import Tensor

from fastrnn.training.errors import InputError
from fastrnn.training.optim import Optim
from fastrnn.training.stack import Stack

FREE = {"backend", "dropout", "forget_bias"}  # of a stack: may differ between a checkpoint and its reader


class SequenceTask(L.LightningModule):
    """A model over a recurrent stack with its loss and metrics.

    Args:
        spec: what the model must know of the data (sizes, vocabulary, classes, scale): the ``spec``
            of the data module; it is saved with the model, so that a checkpoint stands alone.
        stack: the recurrent module.
        optim: optimizer and schedule.

    Between ``training_step`` and its back-propagation, ``end_loss`` gives the part of the loss that
    stands at the last time step alone, or is None if all of it does, or none of it can.
    """

    end_loss: Callable[[], Tensor] | None = None

    def __init__(self, spec: dict[str, Any], stack: Stack | None, optim: Optim | None) -> None:
        super().__init__()
        self.spec = spec
        self.stack = Stack(**stack) if isinstance(stack, dict) else stack or Stack()
        self.optim = Optim(**optim) if isinstance(optim, dict) else optim or Optim()

    def loss_of(self, batch: Any) -> Tensor:
        """The training loss of a batch; nothing is changed by it."""
        raise NotImplementedError

    def on_after_backward(self) -> None:
        self.end_loss = None

    def exhibits(self) -> Iterator[tuple[str, Figure | str]]:
        """Titled pictures and texts for the report, from the last evaluation."""
        return iter(())

    def configure_optimizers(self) -> Any:
        optimizer = self.optim.optimizer(self.parameters())
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
            **{f"data.{k}": v for k, v in self.spec.items()},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["structure"] = self.structure()
        checkpoint["hyper_parameters"] = {
            k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v
            for k, v in checkpoint.get("hyper_parameters", {}).items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, here = checkpoint.get("structure", {}), self.structure()
        differing = [k for k in here if saved.get(k) != here[k]]
        if differing:
            each = "; ".join(f"{k} is {short(saved.get(k))} there, {short(here[k])} here" for k in differing)
            raise InputError(f"the checkpoint is of another configuration: {each}")


def short(value: Any) -> str:
    """A value in an error message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
