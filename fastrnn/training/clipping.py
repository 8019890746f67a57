"""Gradient clipping that says what it did, and a policy for gradients that are not finite."""

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from fastrnn.training.errors import check_name, check_number

POLICIES = ("raise", "skip", "ignore")


def clip(parameters: Iterable[nn.Parameter], norm: float | None, value: float | None) -> Tensor:
    """Clip gradients in place, by global norm and then by value; the norm as it was before.

    The norm's rule: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural
    networks", ICML 2013.

    Raises:
        InputError: a limit that is not above 0.
    """
    check_limits(norm, value)
    with_grad = [p for p in parameters if p.grad is not None]
    if not with_grad:
        return torch.zeros(())
    before = torch.nn.utils.get_total_norm([p.grad for p in with_grad if p.grad is not None])
    if norm is not None:
        torch.nn.utils.clip_grads_with_norm_(with_grad, norm, before)
    if value is not None:
        torch.nn.utils.clip_grad_value_(with_grad, value)
    return before


def check_limits(norm: float | None, value: float | None) -> None:
    for name, limit in (("norm", norm), ("value", value)):
        if limit is not None:
            check_number(f"clipping.{name}", limit, "(0, inf)")


class GradientClipping(L.Callback):
    """Clips before each optimizer step; logs the norm as it was and the share of clipped steps.

    Args:
        norm: largest global norm, None for no limit.
        value: largest absolute value of an entry, None for no limit.
        nonfinite: what to do with a NaN or infinite gradient: ``raise`` stops the run with the
            names of the parameters, ``skip`` leaves this step out (and counts it), ``ignore``
            steps with it.

    Where a GradScaler scales the loss (``precision: 16-mixed``), it leaves out a step whose scaled
    gradients overflow, and halves its scale. Such a step counts as skipped; ``raise`` stops the run
    once the scale is 1 and the overflow is not the scaler's.

    Raises:
        InputError: a limit that is not above 0, or an unknown policy.
        FloatingPointError: in training, with ``raise``.
    """

    def __init__(
        self, norm: float | None = None, value: float | None = None, nonfinite: str = "raise"
    ) -> None:
        check_name("clipping.nonfinite", nonfinite, POLICIES)
        check_limits(norm, value)
        self.norm, self.value, self.nonfinite = norm, value, nonfinite
        self.counts = {"steps": 0, "clipped": 0, "skipped": 0}

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        parameters = list(pl_module.parameters())
        largest = self._largest(parameters) if self.value is not None else 0.0
        before = float(clip(parameters, self.norm, self.value))
        self.counts["steps"] += 1
        scaler = getattr(trainer, "scaler", None)
        if not (before < float("inf")) and scaler and scaler.is_enabled() and scaler.get_scale() > 1.0:
            self.counts["skipped"] += 1  # by the scaler, in its step
        elif not (before < float("inf")) and self.nonfinite != "ignore":
            self._refuse(pl_module, trainer.global_step)
        else:
            over = self.norm is not None and before > self.norm
            self.counts["clipped"] += over or largest > (self.value or float("inf"))
        pl_module.log("gradient/norm", before)
        for name in ("clipped", "skipped"):
            pl_module.log(f"gradient/{name}", self.counts[name] / self.counts["steps"])

    @staticmethod
    def _largest(parameters: list[nn.Parameter]) -> float:
        return max((float(p.grad.abs().max()) for p in parameters if p.grad is not None), default=0.0)

    def _refuse(self, pl_module: L.LightningModule, step: int) -> None:
        if self.nonfinite == "raise":
            names = [
                name
                for name, p in pl_module.named_parameters()
                if p.grad is not None and not p.grad.isfinite().all()
            ]
            raise FloatingPointError(f"gradient is not finite at step {step}: {', '.join(names)}")
        self.counts["skipped"] += 1
        for p in pl_module.parameters():
            p.grad = None  # optimizers leave such parameters, and their moments, as they are

    def state_dict(self) -> dict[str, int]:
        return dict(self.counts)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.counts.update(state)
