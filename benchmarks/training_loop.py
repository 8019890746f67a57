"""What the training loop costs the host beside the same steps in a bare loop of torch, on the CPU.

    python benchmarks/training_loop.py [ROUNDS] [--profile]

The character model of the shipped configuration, so small (H = 8, 2 rows of 4 symbols) that its kernels take
next to no time, with every callback of the command line. A round trains STEPS steps by ``python -m fastrnn
train fit`` and as many in a loop of a few lines, in turn, in this process: microseconds of CPU time a step,
the median and the range over the rounds.
"""

import contextlib
import cProfile
import io
import pstats
import sys
import tempfile
import time
import warnings
from statistics import median
from typing import Any

import lightning as L
import torch

from fastrnn.training import Optim, TextData
from fastrnn.training.cli import CONFIGS, run

WARM, STEPS = 50, 1000
SETTINGS = [
    "fit", f"--config={CONFIGS}/shakespeare.yaml", "--model.stack.hidden_size=8", "--model.embedding_size=8",
    "--data.rows=2", "--data.k1=4", "--trainer.accelerator=cpu", f"--trainer.max_steps={WARM + STEPS}",
    "--trainer.limit_val_batches=0", "--trainer.limit_test_batches=0", "--trainer.enable_progress_bar=false",
    "--trainer.enable_checkpointing=false", "--report.write=false", "--flow.every_n_steps=0",
    "--trainer.callbacks+=__main__.Clock",
]  # fmt: skip


class Clock(L.Callback):
    """The CPU time of the steps after the first ones."""

    start = spent = 0.0
    profile: cProfile.Profile | None = None

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == WARM:
            Clock.start = time.process_time()
            if Clock.profile:
                Clock.profile.enable()

    def on_train_end(self, *args: Any) -> None:
        if Clock.profile:
            Clock.profile.disable()
        Clock.spent = time.process_time() - Clock.start


def loop() -> Any:
    """A run of the command line; the model and the data, trained by it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        return run([*SETTINGS, f"--runs={folder}"])


def bare(cli: Any) -> float:
    """CPU seconds of STEPS steps of the same model: forward, backward, clipping, optimizer, schedule."""
    model, data = cli.model, cli.datamodule
    batches: TextData = data.batches("train", 0, 1)
    optim: Optim = model.optim
    optimizer = optim.optimizer(model.parameters())
    scheduler = optim.scheduler(optimizer, WARM + STEPS)
    start = 0.0
    model.train()
    for step in range(WARM + STEPS):
        if step == WARM:
            start = time.process_time()
        batch = batches.batch(0, step)
        optimizer.zero_grad()
        logits = model._chunk_logits(batch, model.carriers["train"])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return time.process_time() - start


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if "--profile" in sys.argv:
        Clock.profile = cProfile.Profile()
        loop()
        pstats.Stats(Clock.profile).sort_stats("cumulative").print_stats(70)
        return
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    found: dict[str, list[float]] = {"command line": [], "bare loop": []}
    for _ in range(rounds):
        cli = loop()
        found["command line"].append(1e6 * Clock.spent / STEPS)
        found["bare loop"].append(1e6 * bare(cli) / STEPS)
    for name, each in found.items():
        print(f"{name}: {median(each):.0f} us a step ({min(each):.0f} to {max(each):.0f})")


if __name__ == "__main__":
    main()
