"""The first screen of the command line, and the settings that a wrong name may have meant."""

import difflib
import inspect
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import lightning as L

from fastrnn.training.classification import SequenceClassifier
from fastrnn.training.clipping import GradientClipping
from fastrnn.training.data.labelled import JapaneseVowels
from fastrnn.training.data.memory import MemoryData
from fastrnn.training.data.series import SeriesData
from fastrnn.training.data.table import CsvFormat
from fastrnn.training.data.text import TextData
from fastrnn.training.forecasting import Forecaster
from fastrnn.training.gradient_flow import GradientFlow
from fastrnn.training.language import LanguageModel
from fastrnn.training.report import Report
from fastrnn.training.run import BestCheckpoint, LastCheckpoint

CONFIGS = Path(__file__).parent / "configs"
GROUPS: dict[str, list[Any]] = {
    "model": [Forecaster, LanguageModel, SequenceClassifier],
    "data": [SeriesData, CsvFormat, TextData, MemoryData, JapaneseVowels],
    "trainer": [L.Trainer],
    "clipping": [GradientClipping],
    "flow": [GradientFlow],
    "best": [BestCheckpoint],
    "last": [LastCheckpoint],
    "report": [Report],
}
COMMON = {  # other people's names of settings
    "learning_rate": "lr", "epochs": "max_epochs", "steps": "max_steps",
    "resume": "ckpt_path", "output": "runs", "gpu": "accelerator", "device": "accelerator", "gpus": "devices",
    "hidden": "hidden_size", "units": "hidden_size", "layers": "num_layers",
    "file": "source", "path": "source", "csv": "source", "column": "columns", "text": "paths",
}  # fmt: skip
FILES = "a CSV file is given as --data.source FILE, a text as --data.paths FILE"
HELP = """\
usage: python -m fastrnn train fit --config NAME [--SETTING VALUE] ...

Train a recurrent network, test it, and write a report with curves and examples into the folder runs/.
Begin with a shipped configuration:

  python -m fastrnn train fit --config co2

{configs}

Data of your own, in the place of the shipped:

  a CSV file of numbers over time, to forecast
      python -m fastrnn train fit --config co2 --data.source my.csv --data.columns load --data.season 24
  a text, to continue
      python -m fastrnn train fit --config shakespeare --data.paths my.txt
  sequences with a class each: arrays in Python, by LabelledData (examples/own_arrays.py)

Settings that are changed most (each is given as --NAME VALUE):

  model.stack.cell lstm, gru, rnn         model.stack.hidden_size, model.stack.num_layers
  model.optim.lr                          model.stack.dropout
  trainer.max_epochs, trainer.max_steps   trainer.accelerator cpu (a GPU is taken where there is one)
  data.batch_size, in texts data.rows     name: the run's folder inside of runs/

Commands:

  fit              train, then test the best checkpoint; Ctrl-C ends it and prints the command that goes on
  validate, test   the metrics of a checkpoint (--ckpt_path)
  predict          a checkpoint's predictions, as JSON
  sweep            fit over a grid of settings
  compare          runs side by side

More:

  python -m fastrnn train fit --config co2 --print_config     all settings with their values
  python -m fastrnn train fit --help-all                      what they mean, but for those of model and data:
  python -m fastrnn train fit --model.help Forecaster         or LanguageModel, SequenceClassifier
  python -m fastrnn train fit --model.help Forecaster --model.stack.help      likewise --model.optim.help
  python -m fastrnn train fit --data.help SeriesData          or TextData, MemoryData, JapaneseVowels
"""


def shipped_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def help_text() -> str:
    """The first screen: each shipped configuration has its first line there, a comment, as what it is."""
    firsts = {
        n: (CONFIGS / f"{n}.yaml").read_text(encoding="utf-8").partition("\n")[0] for n in shipped_names()
    }
    return HELP.format(
        configs="\n".join(f"  {name:17}{first.lstrip('# ')}" for name, first in firsts.items())
    )


def parameters(prefix: str, kind: Any) -> Iterator[str]:
    """The settings of a class, those of its dataclasses inside them."""
    hints = get_type_hints(kind if is_dataclass(kind) else kind.__init__)
    for name, p in inspect.signature(kind).parameters.items():
        inside = [t for t in (hints.get(name), *get_args(hints.get(name))) if is_dataclass(t)]
        if inside:
            yield from parameters(f"{prefix}.{name}", inside[0])
        elif name != "spec" and p.kind is not inspect.Parameter.VAR_KEYWORD:
            yield f"{prefix}.{name}"


@cache
def settings() -> dict[str, list[str]]:
    """Every setting by its whole name, such as model.optim.lr, and the classes that have it."""
    found: dict[str, list[str]] = {
        name: [] for name in ("name", "runs", "tensorboard", "ckpt_path", "config")
    }
    for group, kinds in GROUPS.items():
        for kind in kinds:
            for name in parameters(group, kind):
                found.setdefault(name, []).append("SeriesData" if kind is CsvFormat else kind.__name__)
    return found


def meant(name: str) -> str:
    """Half a sentence about a setting that was not accepted; nothing where no other comes near it."""
    if owners := settings().get(name):
        return f"--{name} is a setting of {' and '.join(owners)}"
    group, _, last = name.rpartition(".")
    last = COMMON.get(last, last)
    lasts: dict[str, list[str]] = {}
    for setting in settings():
        lasts.setdefault(setting.rpartition(".")[2], []).append(setting)
    near = [last] if last in lasts else difflib.get_close_matches(last, lasts, 3, 0.7)
    found = [s for word in near for s in lasts[word] if s.startswith(group.partition(".")[0])]
    found = found or [s for word in near for s in lasts[word]]
    return f"there is --{' and --'.join(found[:3])}" if found else ""


def hint(message: str) -> str:
    """A refusal of the parser, with what to write instead where that is known."""
    if found := re.match(
        r"(data|model): .*(Unexpected import path|Expected a dot import path)", message, re.DOTALL
    ):
        classes = ", ".join(kind.__name__ for kind in GROUPS[found[1]] if kind is not CsvFormat)
        return f"{found[1]} must be a class, such as {classes}; {FILES}"
    if key := re.search(r"(?:^|(\S+): )Option '([\w.]+)' is not accepted(?! before)", message):
        more = meant(".".join(filter(None, key.groups())))
    elif wrong := re.search(r"unrecognized arguments: (\S+)", message):
        more = meant(wrong[1].lstrip("-").partition("=")[0]) if wrong[1].startswith("-") else given(wrong[1])
    elif "before subcommand" in message:
        more = "--config and settings stand after the command: python -m fastrnn train fit --config NAME"
    elif 'expected "subcommand"' in message or "arguments are required" in message:
        more = f"begin with python -m fastrnn train fit --config NAME, of {', '.join(shipped_names())}"
    else:
        more = ""
    return f"{message.rstrip('.')}; {more}" if more else message


def given(word: str) -> str:
    """How a file, or the name of a configuration, is handed over."""
    if word in shipped_names() or Path(word).suffix in (".yaml", ".yml"):
        return f"there is --config {word}"
    return FILES if Path(word).is_file() else ""
