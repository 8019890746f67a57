"""How gradients travel back in time, seen while a model trains."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from matplotlib.figure import Figure

from fastrnn.training import plots
from fastrnn.training.states import state_gradients

VANISHED = 0.01  # of the norm at the loss
EXPLODED = 100.0  # times the norm at the loss


class GradientFlow(L.Callback):
    """Records the norm of dL/dh_t and dL/dc_t for every time step, on every n-th training step.

    The norms are exact (see ``states``) and come from a pass of its own over some rows of the
    batch, before the training step; training itself is not changed by it, not even in its random
    numbers. The task's ``flow_losses`` says which losses are followed back. A record that would
    cost more than the budget is left out; the cost is logged as ``gradient/flow_cost``.

    Args:
        every_n_steps: optimizer steps from one record to the next; 0 switches it off.
        budget: largest share of the training time; only the first record does not ask.
        rows: of the batch that are followed.
    """

    def __init__(self, every_n_steps: int = 100, rows: int = 4, budget: float = 0.04) -> None:
        self.every_n_steps, self.rows, self.budget = every_n_steps, rows, budget
        self.records: list[dict[str, Any]] = []  # step, loss -> quantity -> norms [K], parameters
        self.seconds, self._last = 0.0, 0.0
        self._started, self._ended = 0.0, 0.0
        self._due = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._due = (
            self.every_n_steps > 0
            and trainer.is_global_zero
            and trainer.global_step % self.every_n_steps == 0
            and self._affordable()
        )
        if not self._due:
            return
        start = time.perf_counter()
        few = batch.narrow(self.rows)
        flows = state_gradients(pl_module, lambda: pl_module.flow_losses(few))
        norms = {
            loss: {key: v.tolist() for key, v in quantities.items()} for loss, quantities in flows.items()
        }
        self.records.append({"step": trainer.global_step, "norms": norms, "parameters": {}})
        self._last = time.perf_counter() - start
        self.seconds += self._last
        pl_module.log("gradient/reach", float(reach(self._last_profile())))
        pl_module.log("gradient/flow_cost", self.cost)

    def _affordable(self) -> bool:
        elapsed = time.perf_counter() - self._started
        return not self.seconds or self.seconds + self._last <= self.budget * elapsed

    @property
    def cost(self) -> float:
        """Share of the time since training began."""
        return self.seconds / max(1e-9, (self._ended or time.perf_counter()) - self._started)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        if self._due:
            self.records[-1]["parameters"] = {
                name: float(p.grad.norm()) for name, p in pl_module.named_parameters() if p.grad is not None
            }

    def _last_profile(self, record: int = -1) -> np.ndarray:
        """The norm [K] over all states, h and c, for the loss that stands latest in time."""
        quantities = list(self.records[record]["norms"].values())[-1]
        return np.sqrt(np.sum([np.square(v) for v in quantities.values()], axis=0))

    def verdict(self) -> str:
        """What the first and the last records say, in plain words."""
        first, last = describe(self._last_profile(0)), describe(self._last_profile(-1))
        start, end = self.records[0]["step"], self.records[-1]["step"]
        if first == last:
            return f"{last[0].upper()}{last[1:]}, from step {start} to step {end}."
        return f"At step {end}, {last}; at step {start}, {first}."

    def effort(self) -> str:
        """How the records were made, and what they cost."""
        count = f"{len(self.records)} records, {self.rows} rows of the batch each"
        return f"{count}; {100 * self.cost:.1f} % of the training time."

    def stacked(self, loss: str, quantity: str) -> np.ndarray:
        """Norms [records, K]; shorter records are filled with NaN."""
        profiles = [r["norms"][loss][quantity] for r in self.records]
        longest = max(map(len, profiles))
        return np.array([p + [np.nan] * (longest - len(p)) for p in profiles])

    def figures(self) -> Iterator[tuple[str, Figure]]:
        steps = [r["step"] for r in self.records]
        for loss, quantities in self.records[-1]["norms"].items():
            for quantity in quantities:
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
        np.savez_compressed(path, steps=[r["step"] for r in self.records], **arrays)

    def state_dict(self) -> dict[str, Any]:
        return {"records": self.records}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.records = state["records"]


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
