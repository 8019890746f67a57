"""Classify one's own arrays of different lengths: is a noisy wave rising or falling in frequency?"""

import lightning as L
import numpy as np

from fastrnn.training import LabelledData, Optim, SequenceClassifier, Stack

generator = np.random.default_rng(0)


def waves(count: int) -> tuple[list[np.ndarray], list[str]]:
    arrays, labels = [], []
    for i in range(count):
        t = np.linspace(0, 1, generator.integers(20, 60))
        t = t if i % 2 else 1 - t
        wave = np.sin(30 * t**2) + 0.1 * generator.normal(size=len(t))
        arrays.append(wave[:, None])  # [T, 1]
        labels.append("rising" if i % 2 else "falling")
    return arrays, labels


L.seed_everything(0)
data = LabelledData(train=waves(256), val=waves(64), test=waves(64))
model = SequenceClassifier(data.spec, Stack(cell="gru", hidden_size=24), Optim(lr=0.01))
trainer = L.Trainer(max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(model, datamodule=data)
trainer.test(model, datamodule=data)
