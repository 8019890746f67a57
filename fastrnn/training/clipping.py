"""Gradient clipping that says what it did, and a policy for gradients that are not finite."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from fastrnn.training.errors import check_name, check_number
from fastrnn.training.optim import is_fused
from fastrnn.training.tasks import is_logged

POLICIES = ("raise", "skip", "ignore")
MOST_PENDING = 50  # steps: the latest that a gradient that is not finite ends a run


def clip(parameters: Iterable[nn.Parameter], norm: float | None, value: float | None) -> Tensor:
    """Clip gradients in place, by global norm and then by value; the norm as it was before.

    The norm's rule: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural
    networks", ICML 2013.

    Raises:
        InputError: a limit that is not above 0.
    """
    check_limits(norm, value)
    with_grad = [p for p in parameters if p.grad is not None]
    before = torch.linalg.vector_norm(norms_of(with_grad))
    clip_to(with_grad, before, norm, value)
    return before


def norms_of(parameters: list[nn.Parameter], order: float = 2.0) -> Tensor:
    """The norms [len(parameters)] of their gradients."""
    grads = [p.grad for p in parameters if p.grad is not None] or [torch.zeros(())]
    norms = torch._foreach_norm(grads, order)
    return torch.stack([n.to(norms[0].device, non_blocking=True) for n in norms])


def clip_to(parameters: list[nn.Parameter], total: Tensor, norm: float | None, value: float | None) -> None:
    """Clip in place gradients whose global norm is known."""
    if norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, norm, total)
    if value is not None and parameters:
        torch.nn.utils.clip_grad_value_(parameters, value)


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

    No step waits for the device: the norms stay there until a step is logged, or ``MOST_PENDING`` of
    them are there, and before each validation and checkpoint. A fused optimizer (all of ``Optim``'s
    but rmsprop) leaves out an update by a number on the device, at ``raise`` also those that follow: so
    the run ends a few steps late, with the weights and moments from before the step that it names. With
    another optimizer these two policies wait for the norm at each step.

    Where a GradScaler scales the loss (``precision: 16-mixed``), it leaves out a step whose scaled
    gradients overflow, halves its scale, and waits for that at each step. Such a step counts as
    skipped; ``raise`` stops the run once the scale is 1 and the overflow is not the scaler's.

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
        self._counts = {"steps": 0, "clipped": 0, "skipped": 0}
        self._pending: list[Pending] = []
        self._failed: Tensor | None = None  # 1 on the device from a step that is to end the run

    @property
    def counts(self) -> dict[str, int]:
        """Steps, and how many of them were clipped or skipped; waits for the device."""
        self._read()
        return self._counts

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pending, self._failed = [], None

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        given = (p for group in optimizer.param_groups for p in group["params"])
        parameters = [p for p in given if p.grad is not None]
        norms = norms_of(parameters)
        total = torch.linalg.vector_norm(norms)
        largest = norms_of(parameters, torch.inf).max() if self.value is not None else None
        clip_to(parameters, total, self.norm, self.value)
        self._pending.append(Pending(trainer.global_step, pl_module, parameters, norms, total, largest))
        self._counts["steps"] += 1
        scaler = getattr(trainer, "scaler", None)
        if scaler and scaler.is_enabled():
            self._read(waiting=True, by_scaler=scaler.get_scale() > 1.0)
        elif self.nonfinite != "ignore" and not is_fused(optimizer):
            self._read(waiting=True)
        elif self.nonfinite != "ignore":
            failed = total.isfinite().logical_not().float()
            if self.nonfinite == "raise":
                self._failed = failed = failed if self._failed is None else self._failed.maximum(failed)
            optimizer.found_inf = failed
        if is_logged(trainer):
            self._read()
            pl_module.log("gradient/norm", total)
            for name in ("clipped", "skipped"):
                pl_module.log(f"gradient/{name}", self._counts[name] / self._counts["steps"])
        elif len(self._pending) >= MOST_PENDING:
            self._read()

    def _read(self, waiting: bool = False, by_scaler: bool = False) -> None:
        """Count the pending steps; ``waiting``: the optimizer has yet to make the last one."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        totals = torch.stack([p.total for p in pending]).tolist()
        largest = torch.stack([p.total if p.largest is None else p.largest for p in pending]).tolist()
        for step, total, entry in zip(pending, totals, largest, strict=True):
            if total < float("inf"):
                over = self.norm is not None and total > self.norm
                self._counts["clipped"] += over or (self.value is not None and entry > self.value)
            elif self.nonfinite == "raise" and not by_scaler:
                raise FloatingPointError(f"gradient is not finite at step {step.number}: {step.bad()}")
            elif self.nonfinite == "skip" or by_scaler:
                self._counts["skipped"] += 1
                if waiting and not by_scaler:
                    for p in step.parameters:
                        p.grad = None  # optimizers leave such parameters, and their moments, as they are

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read()

    def state_dict(self) -> dict[str, int]:
        return dict(self.counts)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._counts.update(state)


class Pending(NamedTuple):
    """A step whose norms are still on the device."""

    number: int
    model: nn.Module
    parameters: list[nn.Parameter]  # that have a gradient
    norms: Tensor  # [parameters]
    total: Tensor
    largest: Tensor | None  # absolute value of an entry, where it is limited

    def bad(self) -> str:
        """Which gradients are not finite, by the names of their parameters."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        finite = self.norms.isfinite().tolist()
        found = [names[id(p)] for p, ok in zip(self.parameters, finite, strict=True) if not ok]
        return ", ".join(found) or "the norm of all together overflows"
