"""``python -m fastrnn train``: LightningCLI over the tasks and data of this package."""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from fastrnn.training import compare, sweep
from fastrnn.training.clipping import GradientClipping
from fastrnn.training.data.module import SequenceData
from fastrnn.training.errors import InputError
from fastrnn.training.gradient_flow import GradientFlow
from fastrnn.training.report import Report
from fastrnn.training.run import AtomicCheckpoints, BestCheckpoint, LastCheckpoint, Resume, RunLog
from fastrnn.training.speed import Throughput
from fastrnn.training.tasks import SequenceTask

CONFIGS = Path(__file__).parent / "configs"


class Lines(ProgressBar):
    """The progress of a run where there is no terminal: one line at each validation."""

    def disable(self) -> None:
        """Lightning's call in all processes but the first, which alone prints."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.is_global_zero:
            shown = {k: v for k, v in self.get_metrics(trainer, pl_module).items() if k != "v_num"}
            values = "  ".join(f"{k} {v:.5g}" for k, v in shown.items())
            print(f"step {trainer.global_step}  {values}", flush=True)


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
        if self._get(self.config, "trainer").enable_progress_bar is not False:
            bar = RichProgressBar() if sys.stdout.isatty() else Lines()
            self.trainer_defaults["callbacks"].append(bar)

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
            spec = saved.get("hyper_parameters", {}).get("spec", {})
            self.datamodule.adopt(spec)
            self.model = type(self.model)(**{**self.model.hparams, "spec": spec})

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        folder, name = self._get(self.config, "runs"), self._get(self.config, "name")
        log = RunLog(folder, name if self.subcommand == "fit" else f"{name}-{self.subcommand}")
        loggers: list[Any] = [log]
        if self._get(self.config, "tensorboard"):
            loggers.append(TensorBoardLogger(log.log_dir, name="", version="tensorboard"))
        return super().instantiate_trainer(logger=loggers, plugins=[AtomicCheckpoints()], **kwargs)

    def after_fit(self) -> None:
        if not self.trainer.fast_dev_run and self.trainer.checkpoint_callback.best_model_path:
            best = self.trainer.checkpoint_callback.best_model_path
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best)
        self.after_test()

    def after_test(self) -> None:
        for callback in self.trainer.callbacks:
            if isinstance(callback, Report) and callback.path:  # only the first process has one
                print(f"report: {callback.path.resolve()}")

    def _run_subcommand(self, subcommand: str) -> None:
        """The command; predictions are written as JSON, for Lightning hands them to nobody."""
        if subcommand != "predict":
            super()._run_subcommand(subcommand)
            return
        found = self.trainer.predict(
            self.model, datamodule=self.datamodule, ckpt_path=self._get(self.config, "ckpt_path")
        )
        path = Path(self.trainer.log_dir) / f"predictions{self.trainer.global_rank or ''}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, ensure_ascii=False, indent=1, default=lambda t: t.tolist())
        path.write_text(text, encoding="utf-8")
        print(f"predictions: {path.resolve()}")


def with_shipped_configs(argv: list[str]) -> list[str]:
    """The arguments, with the bare names of shipped configurations replaced by their paths."""
    configs = {i + 1 for i, argument in enumerate(argv) if argument in ("-c", "--config")}
    return [shipped_config(a) if i in configs else a for i, a in enumerate(argv)]


def shipped_names() -> str:
    return ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))


def help_text() -> str:
    return (
        f"Train a sequence model. --config takes a file, or a shipped name: {shipped_names()}. "
        "Beside the subcommands below: sweep (a grid of hyper-parameters) and compare (runs)."
    )


def shipped_config(name: str) -> str:
    path = CONFIGS / f"{name}.yaml"
    if Path(name).is_file() or name.startswith("-"):
        return name
    if not path.is_file():
        raise InputError(f"no configuration {name}: give a file, or one of {shipped_names()}")
    return str(path)


def main(argv: list[str]) -> int:
    """Run one command; bad input ends with one line on stderr and status 2."""
    try:
        if argv[:1] == ["sweep"]:
            return sweep.main(argv[1:])
        if argv[:1] == ["compare"]:
            return compare.main(argv[1:])
        run(with_shipped_configs(argv))
    except Exception as error:
        cause = input_error(error)
        if cause is None:
            raise
        print(f"fastrnn train: {cause}", file=sys.stderr)
        return 2
    return 0


def input_error(error: BaseException | None) -> InputError | None:
    """The bad input behind an error: the parser wraps what a class says of its arguments."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def is_news(record: logging.LogRecord) -> bool:
    """False for Lightning's advertisements and for what no run here needs."""
    return not record.getMessage().startswith(("💡", "`weights_only`", "TPU"))


def run(argv: list[str]) -> SequenceCLI:
    """One command, in this process; the trainer and the task are attributes of what comes back."""
    for noise in ("LightningCLI's args parameter", ".*LeafSpec", ".*num_workers"):
        warnings.filterwarnings("ignore", message=noise)
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(is_news)
    return SequenceCLI(
        SequenceTask,
        SequenceData,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        seed_everything_default=0,
        parser_kwargs={"prog": "python -m fastrnn train", "description": help_text()},
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "callbacks": [Throughput(), Resume(), LearningRateMonitor("step")],
            "log_every_n_steps": 10,
            "enable_model_summary": True,
        },
        args=argv,
    )
