"""A run on disk: its log, checkpoints that survive a kill, early ends and resuming."""

import contextlib
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from fastrnn.training.errors import InputError, check_name, in_short

PATIENCE = 10.0  # seconds that a step may take to end before another Ctrl-C breaks it off


def folder_of_runs(save_dir: str, name: str) -> Path:
    """Where the runs of a name lie; ``~`` is the user's home, which shells leave in ``--runs=~/x``.

    Raises:
        InputError: the name leads out of ``save_dir``.
    """
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise InputError(f"the name of a run must be a folder inside {save_dir or '.'}, got {name!r}")
    return Path(os.path.expanduser(save_dir)) / name


class RunLog(CSVLogger):
    """``metrics.csv``, and the same rows in memory for the report and for the checkpoint.

    Raises:
        InputError: the name leads out of ``save_dir``.
    """

    def __init__(self, save_dir: str = "runs", name: str = "run", version: int | None = None) -> None:
        folder_of_runs(save_dir, name)
        super().__init__(os.path.expanduser(save_dir), name, version, flush_logs_every_n_steps=20)
        self.rows: list[dict[str, float]] = []

    def _get_next_version(self) -> int:
        """The next number that is free, taken by making its folder: runs of one moment share none.

        Raises:
            InputError: the folder cannot be made.
        """
        try:
            number = super()._get_next_version()
            while rank_zero_only.rank == 0:  # type: ignore[attr-defined]
                try:
                    os.makedirs(os.path.join(self.root_dir, f"version_{number}"))
                    break
                except FileExistsError:
                    number += 1
        except (OSError, ValueError) as error:  # ValueError: a null character
            raise InputError(f"cannot write into {self.root_dir}: {error}") from error
        return number

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        row = {k: float(v) for k, v in metrics.items()}
        self.rows.append({"step": step or 0, **row})
        super().log_metrics(metrics, step)

    def replay(self, rows: list[dict[str, float]]) -> None:
        """Take over the rows of the run that this one goes on with."""
        for row in rows:
            row = dict(row)
            self.log_metrics(row, int(row.pop("step")))


def rows_of(trainer: L.Trainer) -> list[dict[str, float]]:
    """What the run has logged so far; nothing if it keeps another log."""
    return trainer.logger.rows if isinstance(trainer.logger, RunLog) else []


class Resume(L.Callback):
    """Keeps in the checkpoint what Lightning does not: random generators, their seed, and the log's rows."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        mine = generator_states()
        states = [None] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, mine)
        checkpoint["generators"] = states if trainer.world_size > 1 else [mine]
        checkpoint["seed"] = os.environ.get("PL_GLOBAL_SEED")
        checkpoint["rows"] = rows_of(trainer)
        rewind(checkpoint["loops"]["fit_loop"])

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loaded = {k: checkpoint[k] for k in ("generators", "seed", "rows") if k in checkpoint}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Also where no step is left to train."""
        if isinstance(trainer.logger, RunLog):
            trainer.logger.replay(self._loaded.get("rows", []))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        generators = self._loaded.get("generators", [])
        if len(generators) == trainer.world_size:
            restore_generators(generators[trainer.global_rank])
            if (seed := os.environ.get("PL_GLOBAL_SEED")) != (until_now := self._loaded.get("seed")):
                rank_zero_info(
                    f"seed_everything={seed} ({until_now} until now) has no effect: "
                    "the random generators go on from the checkpoint"
                )
        self._loaded = {}


def rewind(loop: dict[str, Any]) -> None:
    """Count a finished run as being inside its last step, and a validation as being in its first batch.

    From there Lightning goes on with the next batch; from the counters of a finished run it takes
    one more batch into the old epoch when that was complete, and of a broken off validation it takes
    as many batches as were left, from the first one on (seen with Lightning 2.6).
    """
    batch = loop["epoch_loop.val_loop.batch_progress"]
    if batch["current"]["completed"] < batch["current"]["ready"]:
        before = batch["total"]["completed"] - batch["current"]["completed"]
        for count, done in (("total", before), ("current", 0)):
            batch[count].update(ready=done + 1, started=done + 1, processed=done, completed=done)
    epoch, batch = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    if 0 < epoch["current"]["ready"] == epoch["current"]["completed"]:
        for count in ("total", "current"):
            batch[count]["completed"] -= 1
            for stage in ("processed", "completed"):
                epoch[count][stage] -= 1


def generator_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, as plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes beside the target, then renames: a kill or a full disk leaves the old file whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:  # torch.save reports a short write as RuntimeError
            partial.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free / 2**20
            raise InputError(
                f"cannot write the checkpoint {path} ({error}); {free:.0f} MiB are free there; "
                "checkpoints written before are intact"
            ) from error

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            found = super().load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError:
            raise InputError(f"no checkpoint at {path}") from None
        except Exception as error:  # a damaged file fails in many ways
            raise InputError(f"{path} is not a readable checkpoint: {in_short(error)}") from error
        if Path(path).name == ".temp.ckpt":  # the weights that Lightning's spawned processes hand back
            return found
        keys = list(found) if isinstance(found, dict) else []
        if "state_dict" not in keys or "pytorch-lightning_version" not in keys:
            what = f"a dictionary of {', '.join(map(str, keys[:3]))}" if keys else f"a {type(found).__name__}"
            raise InputError(f"{path} is not a checkpoint of a run but {what}")
        return found


class BestCheckpoint(ModelCheckpoint):
    """``checkpoints/best.ckpt``: the weights with the best value of one validation metric."""

    def __init__(self, monitor: str = "val/loss", mode: str = "min") -> None:
        super().__init__(filename="best", monitor=monitor, mode=mode, enable_version_counter=False)

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse an unknown metric before training; of the others than validation's nothing is known yet."""
        known = [name for name in trainer.callback_metrics if name.startswith("val/")]
        if known and str(self.monitor).startswith("val/"):
            check_name("best.monitor", self.monitor, known)


class LastCheckpoint(ModelCheckpoint):
    """``checkpoints/last.ckpt``: everything that resuming needs, every n steps and at the end."""

    def __init__(self, every_n_train_steps: int = 200) -> None:
        super().__init__(
            filename="last",
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )

    def save(self, trainer: L.Trainer) -> None:
        if self.dirpath and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.save(trainer)


class Interrupted(SystemExit):
    """A signal has ended the command; ``code`` is the status by which shells know it."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.checkpoint: Path | None = None  # to go on from, if the run has written one


class Interrupts(L.Callback):
    """Ctrl-C, SIGTERM and a lost terminal end training after its step, with ``last.ckpt`` written.

    As a context it listens, and raises ``Interrupted``: between two steps while a run trains, at once
    everywhere else. Signals that follow change nothing, unless the step takes more than ``PATIENCE``
    seconds to end. A signal that is ignored, as under ``nohup``, stays ignored.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0
        self._training = self._saved = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
            self._before = {s: handler for s, handler in handlers.items() if handler != signal.SIG_IGN}
        self._listen()
        return self

    def __exit__(self, *error: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _listen(self) -> None:
        for signum in self._before:
            signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        again, self.signum = bool(self.signum), self.signum or signum
        if not again:
            self._since = time.monotonic()
            if self._training:
                with contextlib.suppress(OSError):  # print is not safe here: it may be what was interrupted
                    os.write(sys.stderr.fileno(), b"fastrnn train: ending after this step\n")
                return
        elif not self._training or time.monotonic() - self._since < PATIENCE:
            return
        raise Interrupted(self.signum)

    def _asked(self, trainer: L.Trainer) -> bool:
        """Whether a signal has reached any process: all of them must end at the same step."""
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(bool(self.signum), all=False)
            self.signum = self.signum or int(asked) * signal.SIGTERM
        return bool(self.signum)

    def _save(self, trainer: L.Trainer) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint):
                callback.save(trainer)
        self._saved = True

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = True
        self._listen()  # again: Lightning has put a handler of its own in the place of ours

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self._asked(trainer):
            self._save(trainer)  # a validation may be due: then the run ends in that, to do it again

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self._saved:
            raise Interrupted(self.signum)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self._training and self._asked(trainer):
            if not trainer.sanity_checking:
                self._save(trainer)
            raise Interrupted(self.signum)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._asked(trainer)
        self._training = False

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.signum:
            raise Interrupted(self.signum)
