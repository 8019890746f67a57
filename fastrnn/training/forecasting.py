"""Forecasting and regression: values ahead of a sequence, several steps by feeding outputs back."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanSquaredError

from fastrnn.training import plots
from fastrnn.training.data.batches import SequenceBatch
from fastrnn.training.errors import InputError, check_name, check_number
from fastrnn.training.optim import Optim
from fastrnn.training.stack import Stack, run_padded
from fastrnn.training.standardise import Standardise
from fastrnn.training.tasks import SequenceTask

COLUMNS = 8  # with a picture in the report
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "mae": F.l1_loss,
    "huber": F.huber_loss,
}
SHOWN = 4  # windows in the report


class Forecaster(SequenceTask):
    """Recurrent stack and linear layer; K values ahead, each fed back as the next input.

    Metrics are RMSE and MAE in the data's own units. For a series the test also reports the RMSE of
    a naive forecast: the value one season before, or without a season the last value.

    Args:
        spec: ``{"mean": [I floats], "scale": [I floats], "outputs": O}``, and for series
            ``"columns"`` and ``"season"`` (steps, or None).
        loss: mse, mae or huber.
        centre: measure each window from its last known value, for series whose level drifts.
        one_step: weight of the one-step-ahead errors inside the window, beside those ahead of it.
        dropout: before the linear layer, in training.

    Raises:
        InputError: data without numbers to forecast, an unknown loss, a bidirectional stack, a number
            out of its range, or ``one_step`` where the target is not the next step of the input.
    """

    needs = ("mean", "scale", "outputs")
    fixed = ("centre",)
    rmse: Any  # torchmetrics by stage
    mae: Any

    def __init__(
        self,
        spec: dict[str, Any],
        stack: Stack | None = None,
        optim: Optim | None = None,
        loss: str = "mse",
        centre: bool = False,
        one_step: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(spec, stack, optim)
        self.save_hyperparameters()
        check_name("loss", loss, LOSSES)
        check_number("one_step", one_step, "[0, inf)")
        check_number("dropout", dropout, "[0, 1]")
        if one_step and "columns" not in spec:
            raise InputError(f"one_step is for series, whose next step is in the input; got {one_step}")
        if self.stack.sees_the_future:
            raise InputError("a forecaster cannot be bidirectional or reversed: it would see the future")
        self.error, self.centre, self.one_step = LOSSES[loss], centre, one_step
        self.standard = Standardise(spec)
        self.rnn = self.stack.build(len(spec["mean"]))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.stack.output_size, int(spec["outputs"]))
        stages = ("val", "test")
        rmse, mae = partial(MeanSquaredError, squared=False), MeanAbsoluteError
        self.rmse, self.mae = (
            nn.ModuleDict({s: make().set_dtype(torch.float64) for s in stages}) for make in (rmse, mae)
        )
        self.naive = rmse().set_dtype(torch.float64)
        self._forget()

    def forward(self, x: Tensor, lengths: Tensor, steps: int = 1) -> Tensor:
        """The ``steps`` values [K, B, O] that follow the sequences x [T, B, I], in their units."""
        ahead = self._unscaled(self._scaled_forecast(x, lengths, steps)[0], x, lengths)
        return ahead.to(torch.promote_types(x.dtype, self.head.weight.dtype))

    def _scaled_forecast(self, x: Tensor, lengths: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """K scaled values ahead [K, B, O], and one-step-ahead values of the window [T, B, O]."""
        scaled = self._scaled(x, x, lengths)
        y, state = run_padded(self.rnn, scaled, lengths)
        inside = self.head(self.dropout(y))  # [T, B, O]
        at = (lengths.to(x.device, non_blocking=True) - 1).view(1, -1, 1).expand(1, -1, inside.shape[-1])
        ahead = [inside.gather(0, at)]
        for _ in range(steps - 1):
            y, state = self.rnn(ahead[-1], state)
            ahead.append(self.head(self.dropout(y)))
        return torch.cat(ahead), inside

    def _last(self, x: Tensor, lengths: Tensor) -> Tensor:  # [1, B, I]: the last known values
        at = (lengths.to(x.device, non_blocking=True) - 1).view(1, -1, 1).expand(1, -1, x.shape[-1])
        return x.gather(0, at)

    def _origin(self, x: Tensor, lengths: Tensor) -> Tensor | None:
        return self._last(x, lengths) if self.centre else None

    def _scaled(self, values: Tensor, x: Tensor, lengths: Tensor) -> Tensor:
        return self.standard(values, self._origin(x, lengths)).to(self.head.weight.dtype)

    def _unscaled(self, values: Tensor, x: Tensor, lengths: Tensor) -> Tensor:
        if "columns" not in self.spec:
            return values  # a regression's target is in its own units already
        return self.standard.undo(values, self._origin(x, lengths))

    def _losses(self, batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """The training loss, its part ahead of the window, and the forecast [K, B, O] in the data's units."""
        ahead, inside = self._scaled_forecast(batch.x, batch.lengths, len(batch.y))
        series = "columns" in self.spec
        target = (
            self._scaled(batch.y, batch.x, batch.lengths) if series else batch.y.to(self.head.weight.dtype)
        )
        loss = end = self.error(ahead, target)
        if self.one_step and len(inside) > 1:
            known = self._scaled(batch.x, batch.x, batch.lengths)[1:]
            loss = loss + self.one_step * self.error(inside[:-1], known)
        return loss, end, self._unscaled(ahead, batch.x, batch.lengths)

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        loss, end, ahead = self._losses(batch)
        self.end_loss = (lambda: end) if self.one_step else None
        if self.logs:
            size = batch.y.shape[1]
            self.show("train/loss", loss.detach(), batch_size=size)
            self.log("train/rmse", F.mse_loss(ahead.detach(), batch.y).sqrt(), batch_size=size)
        return loss * batch.weight

    def _evaluate(self, batch: SequenceBatch, stage: str) -> None:
        loss, _, ahead = self._losses(batch)
        self.log(f"{stage}/loss", loss, batch_size=batch.y.shape[1], sync_dist=True)
        self.rmse[stage].update(ahead, batch.y)
        self.mae[stage].update(ahead, batch.y)
        self._show(batch.x, batch.y, ahead)

    def _finish(self, stage: str) -> None:
        self.log(f"{stage}/rmse", self.rmse[stage].compute(), prog_bar=True, sync_dist=True)
        self.log(f"{stage}/mae", self.mae[stage].compute(), sync_dist=True)
        self.rmse[stage].reset()
        self.mae[stage].reset()

    def _forget(self) -> None:
        self._shown: list[tuple[Tensor, Tensor, Tensor]] = []  # past, future, predicted [.., 1, I]
        self._evaluated = 0  # windows so far
        self._every = 1  # of so many windows one is shown

    def _show(self, past: Tensor, future: Tensor, predicted: Tensor) -> None:
        """Remembers a few windows of an evaluation [.., B, I], evenly spaced however many there are."""
        size = past.shape[1]
        for i in range(-self._evaluated % self._every, size, self._every):
            one = slice(i, i + 1)
            self._shown.append((past[:, one].clone(), future[:, one].clone(), predicted[:, one].clone()))
        self._evaluated += size
        while len(self._shown) > 2 * SHOWN:
            self._shown, self._every = self._shown[::2], 2 * self._every

    def on_validation_epoch_start(self) -> None:
        self._forget()

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_start(self) -> None:
        self._forget()

    def test_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        self._evaluate(batch, "test")
        if "columns" in self.spec:
            self.naive.update(self._naive(batch), batch.y)

    def on_test_epoch_end(self) -> None:
        self._finish("test")
        if "columns" in self.spec:
            self.log("test/naive_rmse", self.naive.compute(), sync_dist=True)
            self.naive.reset()

    def _naive(self, batch: SequenceBatch) -> Tensor:  # [K, B, I]
        season = self.spec.get("season") or 1
        steps = torch.arange(len(batch.y)) % season
        return batch.x[len(batch.x) - season + steps]

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """[K, B, O] in the data's units."""
        return self(batch.x, batch.lengths, len(batch.y))

    def loss_of(self, batch: SequenceBatch) -> Tensor:
        return self._losses(batch)[0]

    def exhibits(self) -> Iterator[tuple[str, Figure | str]]:
        if not self._shown or "columns" not in self.spec:
            return
        past, future, ahead = (
            torch.cat(parts, dim=1).cpu().double().numpy() for parts in zip(*self._shown, strict=True)
        )
        some, columns = plots.spread(range(past.shape[1]), SHOWN), self.spec["columns"]
        drawn = plots.spread(range(len(columns)), COLUMNS)
        if len(drawn) < len(columns):
            yield "Forecasts", f"{len(drawn)} of {len(columns)} columns are drawn, evenly spaced."
        for i in drawn:
            figure = plots.forecast(past[:, some, i].T, future[:, some, i].T, ahead[:, some, i].T, columns[i])
            yield f"Forecast of {columns[i]}", figure
