"""``python -m fastrnn train``: LightningCLI over the tasks and data of this package."""

import json
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from fastrnn.training import compare, sweep
from fastrnn.training.arguments import Parser, load_value, refused
from fastrnn.training.clipping import GradientClipping
from fastrnn.training.data.module import SequenceData
from fastrnn.training.errors import InputError, check_number
from fastrnn.training.gradient_flow import GradientFlow
from fastrnn.training.guide import CONFIGS, given, help_text, shipped_names
from fastrnn.training.progress import Bar, Lines, Summary, say
from fastrnn.training.report import Report
from fastrnn.training.run import (
    AtomicCheckpoints,
    BestCheckpoint,
    Interrupted,
    Interrupts,
    LastCheckpoint,
    Resume,
    RunLog,
)
from fastrnn.training.speed import Throughput
from fastrnn.training.tasks import SequenceTask

DESCRIPTION = "Train a sequence model. python -m fastrnn train --help is shorter, and says how to begin."
UNCHECKED = {  # the trainer's settings that Lightning takes as they are, and divides by
    "val_check_interval": "(0, inf)",
    "check_val_every_n_epoch": "(0, inf)",
    "accumulate_grad_batches": "(0, inf)",
    "num_nodes": "(0, inf)",
    "gradient_clip_val": "[0, inf)",
    "log_every_n_steps": "[0, inf)",
    "num_sanity_val_steps": "[-1, inf)",
}


def as_list(value: Any) -> list[Any]:
    """One or several values of a setting, or none."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


class SequenceCLI(LightningCLI):
    """fit, validate, test and predict over any task and data; fit ends with a test of the best."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.spec", "model.init_args.spec", apply_on="instantiate")
        parser.add_argument("--name", type=str, default="run", help="folder of the run")
        parser.add_argument("--runs", type=str, default="runs", help="folder of all runs")
        parser.add_argument("--tensorboard", type=bool, default=False, help="also log for it")
        parser.add_lightning_class_args(GradientClipping, "clipping")
        parser.add_lightning_class_args(GradientFlow, "flow")
        parser.add_lightning_class_args(BestCheckpoint, "best")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(Report, "report")

    def _parse_ckpt_path(self) -> None:
        """The configuration decides, not the checkpoint; a task refuses one that differs."""

    def before_instantiate_classes(self) -> None:
        checkpoint = self._get(self.config, "ckpt_path")
        if checkpoint is not None and "://" not in checkpoint and not os.path.exists(checkpoint):
            raise InputError(f"no checkpoint at {checkpoint}")
        trainer = self._get(self.config, "trainer")
        for name, interval in UNCHECKED.items():
            if isinstance(trainer[name], (int, float)):  # val_check_interval takes spans of time too
                check_number(f"trainer.{name}", trainer[name], interval)
        if trainer.barebones:  # Lightning refuses these defaults of this command line
            trainer.log_every_n_steps = trainer.enable_model_summary = None
            return
        if trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"].append(Bar() if sys.stdout.isatty() else Lines())
        if trainer.enable_model_summary is not False:
            self.trainer_defaults["callbacks"].append(Summary())

    def instantiate_classes(self) -> None:
        """All objects; a checkpoint to be used, not trained on, decides how data is numbered."""
        checkpoint = self._get(self.config, "ckpt_path")
        if self.subcommand != "fit" and not checkpoint:
            raise InputError(
                f"{self.subcommand} needs --ckpt_path: a model that was never trained says nothing"
            )
        super().instantiate_classes()
        if self.subcommand != "fit":
            saved = AtomicCheckpoints().load_checkpoint(checkpoint)
            task, here = saved.get("structure", {}).get("task"), type(self.model).__name__
            if task not in (None, here):
                raise InputError(f"the checkpoint is another task's: {task} there, {here} here")
            spec = saved.get("hyper_parameters", {}).get("spec", {})
            self.datamodule.adopt(spec)
            self.model = type(self.model)(**{**self.model.hparams, "spec": spec})

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        folder, name = self._get(self.config, "runs"), self._get(self.config, "name")
        log = RunLog(folder, name if self.subcommand == "fit" else f"{name}-{self.subcommand}")
        loggers: list[Any] = [log]
        if self._get(self.config, "tensorboard"):
            loggers.append(TensorBoardLogger(log.log_dir, name="", version="tensorboard"))
        given = self._get(self.config_init, "trainer")
        loggers += [logger for logger in as_list(given.logger) if not isinstance(logger, bool)]
        plugins = as_list(given.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpoints())
        settings: dict[str, Any] = {"logger": loggers, "plugins": plugins}
        if given.logger is False or given.barebones:
            settings |= {"logger": False, "default_root_dir": given.default_root_dir or log.log_dir}
        return super().instantiate_trainer(**settings, **kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        """The trainer, without those callbacks of this command line that its settings have no use for."""
        unused: list[type[L.Callback]] = []
        if not config["logger"]:
            unused.append(LearningRateMonitor)
        if config["enable_checkpointing"] is False or config["barebones"]:
            unused += [BestCheckpoint, LastCheckpoint]
        if config["barebones"]:
            unused += [GradientFlow, Report, Throughput]
            self.save_config_callback = None
        every, idle = self.trainer_defaults["callbacks"], tuple(unused)
        self.trainer_defaults["callbacks"] = [c for c in every if not isinstance(c, idle)]
        return super()._instantiate_trainer(config, [c for c in callbacks if not isinstance(c, idle)])

    @property
    def best(self) -> BestCheckpoint | None:
        """The callback that chose the checkpoint to test; None without checkpoints."""
        found = (c for c in self.trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint))
        return next(found, None)

    def after_fit(self) -> None:
        """A test of the best checkpoint, or of the last weights where no checkpoint was chosen."""
        if not self.trainer.fast_dev_run and self.trainer.global_step:  # type: ignore[attr-defined]
            best = self.best.best_model_path if self.best else ""
            if not best:
                rank_zero_info("no checkpoint was chosen by validation: the last weights are tested")
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None)
        self.after_test()

    def after_test(self) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Report) and callback.path:  # only the first process has one
                say(f"report: {callback.path.resolve()}")

    def _run_subcommand(self, subcommand: str) -> None:
        """The command; an interrupted one says which checkpoint there is."""
        try:
            self._predict() if subcommand == "predict" else super()._run_subcommand(subcommand)
        except FloatingPointError:
            self.after_test()
            raise
        except Interrupted as stop:
            kept = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)]
            paths = [Path(c.dirpath) / "last.ckpt" for c in kept if c.dirpath]
            stop.checkpoint = next((path.resolve() for path in paths if path.is_file()), None)
            raise

    def _predict(self) -> None:
        """Writes the predictions as JSON, because Lightning's command line drops them."""
        found = self.trainer.predict(
            self.model, datamodule=self.datamodule, ckpt_path=self._get(self.config, "ckpt_path")
        )
        path = Path(self.trainer.log_dir or ".") / f"predictions{self.trainer.global_rank or ''}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, ensure_ascii=False, indent=1, default=lambda t: t.tolist())
        path.write_text(text, encoding="utf-8")
        say(f"predictions: {path.resolve()}")


class Parsed(SequenceCLI):
    """The settings of a command alone: nothing is made or run."""

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def with_shipped_configs(argv: list[str]) -> list[str]:
    """The arguments, with the bare names of shipped configurations replaced by their paths."""
    found: list[str] = []
    for argument in argv:
        argument = {"-config": "--config", "--help-all": "--help"}.get(argument, argument)
        joined = re.fullmatch(r"(--config=|-c=?)(.*)", argument, re.DOTALL)
        if found and found[-1] in ("-c", "--config"):
            found.append(shipped_config(argument))
        elif joined and argument != "-c":
            found.append(f"--config={shipped_config(joined[2])}")
        else:
            found.append(argument)
    return found


def shipped_config(name: str) -> str:
    """The path of a configuration: a file, or a shipped name.

    Raises:
        InputError: neither, or a file of something else, such as data.
    """
    path = CONFIGS / f"{name}.yaml"
    if name.startswith("-"):
        return name
    if Path(name).is_file():
        check_config(Path(name))
        return name
    if not path.is_file():
        raise InputError(f"no configuration {name}: give a file, or one of {', '.join(shipped_names())}")
    return str(path)


def check_config(path: Path) -> None:
    """Refuse a file that holds no settings; what is wrong in one that does is said by the parser."""
    try:
        settings = load_value(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return
    if not isinstance(settings, dict):
        raise InputError(f"{path} is no configuration in YAML; {given(str(path))}")


def main(argv: list[str]) -> int:
    """Run one command; bad input ends with one line on stderr and status 2."""
    if argv in ([], ["-h"], ["--help"]) or (argv[:1] == ["fit"] and argv[-1] in ("-h", "--help")):
        print(help_text())
        return 0
    try:
        if argv[:1] == ["sweep"]:
            return sweep.main(argv[1:])
        if argv[:1] == ["compare"]:
            return compare.main(argv[1:])
        run(with_shipped_configs(argv))
    except Interrupted as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process ends now: another one changes nothing
        return int(stop.code or 0)
    except FloatingPointError as error:  # GradientClipping's; the report has been written by then
        print(f"fastrnn train: the training diverged: {error}", file=sys.stderr)
        return 1
    except UnicodeEncodeError as error:
        print(f"fastrnn train: {error.object!a} is no name of a file in this locale", file=sys.stderr)
        return 2
    except Exception as error:
        reason = refused(error)
        if reason is None:
            raise
        print(f"fastrnn train: {reason}", file=sys.stderr)
        return 2
    return 0


NO_WARNINGS = ("The number of training batches", "The dirpath has changed")  # true of no run of these
NO_NEWS = (
    "💡",
    "`weights_only`",
    "TPU",
    "Loading `train_dataloader`",
    "Trainer already configured with model",
)


def is_news(record: logging.LogRecord) -> bool:
    """False for Lightning's advertisements and for hints that do not apply to these runs."""
    return not record.getMessage().startswith(NO_NEWS)


def run(argv: list[str], kind: type[SequenceCLI] = SequenceCLI) -> SequenceCLI:
    """Runs one command in this process; the result has the trainer and the task as attributes."""
    for noise in ("LightningCLI's args parameter", ".*LeafSpec", ".*num_workers", *NO_WARNINGS):
        warnings.filterwarnings("ignore", message=noise)
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(is_news)
    with Interrupts() as interrupts:
        try:
            return kind(
                SequenceTask,
                SequenceData,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_class=Parser,
                seed_everything_default=0,
                parser_kwargs={"prog": "python -m fastrnn train", "description": DESCRIPTION},
                save_config_kwargs={"overwrite": True},
                trainer_defaults={
                    "callbacks": [Throughput(), Resume(), LearningRateMonitor("step"), interrupts],
                    "log_every_n_steps": 10,
                    "enable_model_summary": True,
                },
                args=argv,
            )
        except Interrupted as stop:
            kept = "before a checkpoint was written"
            if stop.checkpoint:
                step = torch.load(stop.checkpoint, mmap=True, weights_only=True)["global_step"]
                kept = f"step {step} is kept"
            say(f"interrupted, {kept}; to go on:")
            say(command(argv, stop.checkpoint))
            raise


def command(argv: list[str], checkpoint: Path | None) -> str:
    """A shell command that repeats ``argv`` from a checkpoint on."""
    given = [a for a in argv if not (checkpoint and a.startswith("--ckpt_path="))]
    more = [f"--ckpt_path={checkpoint}"] if checkpoint else []
    return shlex.join([sys.executable, "-m", "fastrnn", "train", *given, *more])
