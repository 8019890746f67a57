"""How gradients travel back in time, seen while a model trains."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastrnn.training import plots
from fastrnn.training.clipping import norms_of
from fastrnn.training.errors import check_whole
from fastrnn.training.speed import synchronized
from fastrnn.training.states import StateGradientNorms

VANISHED = 0.01  # of the norm at the loss
EXPLODED = 100.0  # times the norm at the loss
MAPS = 8  # pictures of single states for each loss


class GradientFlow(L.Callback):
    """Records the norm of dL/dh_t and dL/dc_t for every time step, on every n-th training step.

    The backward kernels of fastrnn's layers give them on the step's own back-propagation; training
    is not changed by it. Where a task's loss stands at many steps, its ``end_loss``, which stands at
    the last one, is propagated back beside it: that one says how far back gradients reach. The cost
    is logged as ``gradient/flow_cost``. A recorded step waits for the device, the others do not.

    Args:
        every_n_steps: optimizer steps from one record to the next; 0 switches it off.

    Raises:
        InputError: every_n_steps is below 0.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        check_whole("flow.every_n_steps", every_n_steps, 0)
        self.every_n_steps = every_n_steps
        self.records: list[dict[str, Any]] = []  # step, loss -> quantity -> norms [K], parameters
        self.seconds = 0.0
        self._started, self._ended = 0.0, 0.0
        self._listening: StateGradientNorms | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = self.every_n_steps > 0 and step % self.every_n_steps == 0 and trainer.is_global_zero
        if due and not (self.records and self.records[-1]["step"] == step):
            self.records.append({"step": step, "norms": {}, "parameters": {}})
            self._listening = StateGradientNorms(pl_module)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        end_loss = getattr(pl_module, "end_loss", None)
        if self._listening is None or end_loss is None or not self._listening.parameters:
            return
        start = synchronized(pl_module.device)
        torch.autograd.grad(end_loss(), self._listening.parameters, retain_graph=True, allow_unused=True)
        self._take("last step")
        self.seconds += time.perf_counter() - start
        self._listening.seconds = 0.0

    def _take(self, loss: str) -> None:
        assert self._listening is not None
        norms = {key: v.tolist() for key, v in self._listening.take().items()}
        if norms:
            self.records[-1]["norms"][loss] = norms

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._listening is None:
            return
        start = synchronized(pl_module.device)
        self._take("loss")
        self._listening.close()
        self.seconds += self._listening.seconds + time.perf_counter() - start
        self._listening = None
        if self.records[-1]["norms"]:
            pl_module.log("gradient/reach", float(reach(self._last_profile())))
            pl_module.log("gradient/flow_cost", self.cost)

    @property
    def cost(self) -> float:
        """Share of the time since training began."""
        return self.seconds / max(1e-9, (self._ended or time.perf_counter()) - self._started)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        if self.records and self.records[-1]["step"] == trainer.global_step:
            with_grad = {name: p for name, p in pl_module.named_parameters() if p.grad is not None}
            norms = norms_of(list(with_grad.values())).tolist()
            self.records[-1]["parameters"] = dict(zip(with_grad, norms, strict=True))

    def _last_profile(self, record: int = -1) -> np.ndarray:
        """The norm [K] over all states, h and c, for the loss that stands latest in time."""
        norms = self.records[record]["norms"]
        quantities = norms.get("last step") or norms["loss"]
        return np.sqrt(np.sum([np.square(v) for v in quantities.values()], axis=0))

    def verdict(self) -> str:
        """What the first and the last records say, in plain words."""
        if not self.records[-1]["norms"]:
            return "No layer ran on fastrnn's kernels: of the states no gradients are known."
        first, last = describe(self._last_profile(0)), describe(self._last_profile(-1))
        start, end = self.records[0]["step"], self.records[-1]["step"]
        if len(self.records) == 1:
            return f"{last[0].upper()}{last[1:]}, at step {end}."
        if first == last:
            return f"{last[0].upper()}{last[1:]}, from step {start} to step {end}."
        return f"At step {end}, {last}; at step {start}, {first}."

    def effort(self) -> str:
        """How the records were made, and what they cost."""
        count = f"{len(self.records)} record{'s' if len(self.records) > 1 else ''}"
        return f"{count}; {100 * self.cost:.2g} % of the training time."

    def stacked(self, loss: str, quantity: str) -> np.ndarray:
        """Norms [records, K]; shorter records are filled with NaN."""
        profiles = [r["norms"][loss][quantity] for r in self.records]
        longest = max(map(len, profiles))
        return np.array([p + [np.nan] * (longest - len(p)) for p in profiles])

    def figures(self) -> Iterator[tuple[str, Figure]]:
        steps = [r["step"] for r in self.records]
        for loss, quantities in self.records[-1]["norms"].items():
            for quantity in plots.spread(quantities, MAPS):
                title = f"d({loss}) / d{quantity}"
                yield (
                    f"flow {loss} {quantity}",
                    plots.heat_map(self.stacked(loss, quantity), steps, title),
                )
            last = {key: np.array(v) for key, v in quantities.items()}
            yield f"flow profile {loss}", plots.profile(last, f"{loss}, at step {steps[-1]}")
        named = [{"step": r["step"], **r["parameters"]} for r in self.records if r["parameters"]]
        if named:
            yield "parameter norms", plots.lines(named, "gradient norm of each parameter")

    def save(self, path: Path) -> None:
        """All norms as an ``.npz``: "loss|quantity" -> [records, K], and the steps."""
        arrays = {
            f"{loss}|{quantity}": self.stacked(loss, quantity)
            for loss, quantities in self.records[-1]["norms"].items()
            for quantity in quantities
        }
        np.savez_compressed(path, steps=[r["step"] for r in self.records], **arrays)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        return {"records": self.records}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the records of a resumed run; a test of the best checkpoint keeps those of its own run."""
        self.records = self.records or state["records"]


def reach(profile: np.ndarray) -> int:
    """Steps back until the norm stays under ``VANISHED`` of its value at the loss."""
    above = np.flatnonzero(profile >= VANISHED * profile[0])
    return int(above[-1]) + 1 if len(above) else 0


def describe(profile: np.ndarray) -> str:
    """One profile [K] in words."""
    if not np.isfinite(profile).all():
        return "gradients are not finite"
    if profile.max() == 0.0:
        return "no gradient reaches the hidden state"
    start = profile[0] or profile.max()
    if profile.max() > EXPLODED * start:
        where = int(profile.argmax())
        return f"gradients explode: {profile.max() / start:.0f} times larger {where} steps back"
    steps = reach(profile)
    if steps < len(profile):
        return f"gradients vanish after about {steps} steps back (under 1 % of their first norm)"
    share = 100 * profile[-1] / start
    return f"gradients reach all {len(profile)} steps back ({share:.0f} % of the norm is left)"
