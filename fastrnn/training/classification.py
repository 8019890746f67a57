"""Sequence classification: one class for a sequence of any length."""

from collections.abc import Iterator
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from fastrnn.training import plots
from fastrnn.training.data.batches import SequenceBatch
from fastrnn.training.errors import InputError, check_name, check_number
from fastrnn.training.optim import Optim
from fastrnn.training.stack import Stack, run_padded
from fastrnn.training.standardise import Standardise
from fastrnn.training.tasks import SequenceTask

POOLS = ("last", "mean", "max")


class SequenceClassifier(SequenceTask):
    """Recurrent stack over the standardised input, pooled over time, linear layer; cross-entropy.

    Metrics are accuracy and macro F1.

    Args:
        spec: ``{"mean": [I floats], "scale": [I floats], "classes": [names]}``.
        pool: ``last`` valid step of each direction, or ``mean`` or ``max`` over the valid steps.
        dropout: before the linear layer, in training.
        noise: standard deviation of Gaussian noise on the standardised input, in training.
        label_smoothing: of the cross-entropy.

    Raises:
        InputError: data without classes, an unknown pool, or a number out of its range.
    """

    needs = ("mean", "scale", "classes")
    fixed = ("pool",)
    accuracy: Any  # torchmetrics by stage
    f1: Any
    confusion: Any

    def __init__(
        self,
        spec: dict[str, Any],
        stack: Stack | None = None,
        optim: Optim | None = None,
        pool: str = "last",
        dropout: float = 0.0,
        noise: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(spec, stack, optim)
        self.save_hyperparameters()
        check_name("pool", pool, POOLS)
        check_number("dropout", dropout, "[0, 1]")
        check_number("noise", noise, "[0, inf)")
        check_number("label_smoothing", label_smoothing, "[0, 1]")
        self.pool, self.noise, self.label_smoothing = pool, noise, label_smoothing
        self.classes = [str(c) for c in spec["classes"]]
        if len(self.classes) < 2:
            raise InputError(f"a classifier needs at least 2 classes, got {self.classes}")
        self.standard = Standardise(spec)
        self.rnn = self.stack.build(len(spec["mean"]))
        self.dropout = nn.Dropout(dropout)
        count = len(self.classes)
        self.head = nn.Linear(self.stack.output_size, count)
        self.accuracy, self.f1, self.confusion = (
            nn.ModuleDict({stage: make() for stage in ("val", "test")})
            for make in (
                lambda: MulticlassAccuracy(count, average="micro"),
                lambda: MulticlassF1Score(count, average="macro"),
                lambda: MulticlassConfusionMatrix(count),
            )
        )
        self._seen: Tensor | None = None  # confusion matrix [C, C] of the last evaluation

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Logits [B, C] of padded sequences x [T, B, I] with lengths [B]."""
        x = self.standard(x).to(self.head.weight.dtype)
        if self.training and self.noise:
            x = x + self.noise * torch.randn_like(x)
        y, state = run_padded(self.rnn, x, lengths)
        return self.head(self.dropout(self._pooled(y, state, lengths.to(y.device, non_blocking=True))))

    def _pooled(self, y: Tensor, state: Any, lengths: Tensor) -> Tensor:  # [B, output_size]
        if self.pool == "last":
            h = state[0] if isinstance(state, tuple) else state  # [L*D, B, P]
            directions = 2 if self.stack.bidirectional else 1
            return torch.cat(list(h[-directions:]), dim=-1)
        if self.pool == "mean":
            return y.sum(0) / lengths[:, None]
        ended = torch.arange(len(y), device=y.device)[:, None] >= lengths  # [T, B]
        return y.masked_fill(ended[..., None], -torch.inf).amax(0)

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        logits = self(batch.x, batch.lengths)
        loss = F.cross_entropy(logits, batch.y, label_smoothing=self.label_smoothing)
        if self.logs:
            size = len(batch.y)
            self.show("train/loss", loss.detach(), batch_size=size)
            right = (logits.argmax(-1) == batch.y).float().mean()
            self.log("train/accuracy", right, batch_size=size)
        return loss * batch.weight

    def _evaluate(self, batch: SequenceBatch, stage: str) -> None:
        logits = self(batch.x, batch.lengths)
        for metric in (self.accuracy, self.f1, self.confusion):
            metric[stage].update(logits, batch.y)
        loss = F.cross_entropy(logits, batch.y)
        self.log(f"{stage}/loss", loss, batch_size=len(batch.y), sync_dist=True)

    def _finish(self, stage: str) -> None:
        self.log(f"{stage}/accuracy", self.accuracy[stage].compute(), prog_bar=True, sync_dist=True)
        self.log(f"{stage}/f1", self.f1[stage].compute(), sync_dist=True)
        self._seen = self.confusion[stage].compute().cpu()
        for metric in (self.accuracy, self.f1, self.confusion):
            metric[stage].reset()

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def test_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Class and probability of each sequence."""
        likelihood, best = self(batch.x, batch.lengths).softmax(-1).max(-1)
        return [
            {"class": self.classes[int(b)], "probability": float(p)}
            for b, p in zip(best, likelihood, strict=True)
        ]

    def loss_of(self, batch: SequenceBatch) -> Tensor:
        return F.cross_entropy(self(batch.x, batch.lengths), batch.y, label_smoothing=self.label_smoothing)

    def exhibits(self) -> Iterator[tuple[str, Figure | str]]:
        if self._seen is not None:
            yield "Confusion matrix", plots.confusion(self._seen.numpy(), self.classes)
