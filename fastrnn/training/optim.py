"""Optimizer and learning-rate schedule of a task, as plain numbers in a configuration."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastrnn.training.errors import InputError, check_name, check_number, check_whole

OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop")
SCHEDULES: dict[str, Callable[[float], float]] = {  # factor at a share in [0, 1] of the run
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "exponential": lambda share: 0.01**share,
}


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``found_inf``, a number on the device, makes the optimizer leave out its update."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@dataclass
class Optim:
    """One optimizer with a warm-up and a schedule, stepped at every batch.

    Args:
        name: sgd, adam, adamw or rmsprop.
        lr: peak learning rate.
        momentum: of sgd and rmsprop.
        beta2: second-moment decay of adam and adamw.
        weight_decay: L2 for sgd, adam and rmsprop; decoupled for adamw.
        decay_all: decay biases and norms too; by default only matrices are decayed.
        schedule: constant, linear, cosine or exponential (to a hundredth), after the warm-up.
        floor: share of lr below which the schedule does not go.
        warmup: steps of linear growth from lr / warmup to lr.

    Raises:
        InputError: an unknown name, or a number out of its range.
    """

    name: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.0
    beta2: float = 0.999
    weight_decay: float = 0.0
    decay_all: bool = False
    schedule: str = "constant"
    floor: float = 0.0
    warmup: int = 0

    def __post_init__(self) -> None:
        check_name("optim.name", self.name, OPTIMIZERS)
        check_name("optim.schedule", self.schedule, SCHEDULES)
        check_number("optim.lr", self.lr, "[0, inf)")
        check_number("optim.momentum", self.momentum, "[0, 1)")
        check_number("optim.beta2", self.beta2, "[0, 1)")
        check_number("optim.weight_decay", self.weight_decay, "[0, inf)")
        check_number("optim.floor", self.floor, "[0, 1]")
        check_whole("optim.warmup", self.warmup, 0)

    def optimizer(self, parameters: Iterable[nn.Parameter], fused: bool = True) -> torch.optim.Optimizer:
        """The optimizer over two groups: decayed, and left alone.

        fused: one kernel for all parameters where torch has one, which is for all but rmsprop. It can leave
        out an update by a number on the device (``GradientClipping``).
        """
        wanted = [p for p in parameters if p.requires_grad]
        decayed = [p for p in wanted if self.decay_all or p.dim() >= 2]
        plain = [p for p in wanted if not self.decay_all and p.dim() < 2]
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        betas = (0.9, self.beta2)
        how: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
        makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
            "sgd": lambda g: torch.optim.SGD(g, lr=self.lr, momentum=self.momentum, **how),
            "adam": lambda g: torch.optim.Adam(g, lr=self.lr, betas=betas, **how),
            "adamw": lambda g: torch.optim.AdamW(g, lr=self.lr, betas=betas, **how),
            "rmsprop": lambda g: torch.optim.RMSprop(g, lr=self.lr, momentum=self.momentum, foreach=True),
        }
        optimizer = makers[self.name]([group for group in groups if group["params"]])
        if self.name == "sgd" and self.momentum and fused:
            # torch 2.13 leaves the momentum uninitialised where the first update of all is left out.
            for p in wanted:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer

    def factor(self, step: int, total: float) -> float:
        """Share of lr at a step of a run of ``total`` steps."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        share = min(1.0, (step - self.warmup) / max(1, total - self.warmup))
        return max(self.floor, SCHEDULES[self.schedule](share))

    def scheduler(self, optimizer: torch.optim.Optimizer, total: float) -> torch.optim.lr_scheduler.LambdaLR:
        """A schedule to be stepped after every optimizer step.

        Raises:
            InputError: the schedule needs an end, and the run has none.
        """
        if self.schedule != "constant" and not math.isfinite(total):
            raise InputError(f"the schedule {self.schedule} needs max_steps or max_epochs")
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: self.factor(s, total))
