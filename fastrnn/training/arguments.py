"""The parser of the command line, and what the errors of bad settings come to: one line each."""

import logging
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from fastrnn.training.errors import InputError, in_short
from fastrnn.training.guide import hint

LONGEST = 800  # characters of an error's line; some quote a whole file
REFUSALS = (ValueError, TypeError, RuntimeError, ImportError, NotImplementedError, AttributeError)
YAML = get_loader("yaml")
log = logging.getLogger(__name__)


UNWRITABLE = {c: 0xF700 + c for c in (*range(0x80, 0x85), *range(0x86, 0xA0))}  # in YAML; for private use


def load_value(text: str) -> Any:
    """A value as YAML has it; but one that begins with ``#`` is that text, and no comment, and control
    characters are characters: in a Latin-1 locale the name of a file in UTF-8 has some."""
    if text.startswith("#") and "\n" not in text:
        return text
    hidden = text.translate(UNWRITABLE)
    return YAML(text) if hidden == text else shown(YAML(hidden))


def shown(value: Any) -> Any:
    """A value with its control characters back."""
    if isinstance(value, dict):
        return {shown(k): shown(v) for k, v in value.items()}
    if isinstance(value, list):
        return [shown(v) for v in value]
    return value.translate({v: k for k, v in UNWRITABLE.items()}) if isinstance(value, str) else value


set_loader("yaml", load_value, (yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are ``InputError`` in place of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # of a parser inside the parser, which catches jsonargparse's own errors
            super().error(message, ex)
        raise InputError(hint(innermost(message))) from ex

    def save(self, cfg: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        """Write a run's configuration; one that cannot be written (a default that YAML has no word for) does
        not end the run."""
        try:
            super().save(cfg, path, *args, **kwargs)
        except ValueError as error:
            Path(path).unlink(missing_ok=True)
            log.warning("the run goes without %s: %s", path, in_short(error))


def innermost(message: str) -> str:
    """The setting and the innermost reasons in jsonargparse's message, a tree with a branch for each type."""
    key = ".".join(re.findall(r'Parser key "(.+?)"', message))
    if not key:
        return message
    if unknown := re.search(r"unrecognized arguments: --([\w.]+)", message):  # of a dataclass in a dataclass
        return f"{key}: Option {unknown[1]!r} is not accepted"
    lines = [
        line for line in message.splitlines() if re.match(r" +(- )?(Expected a|Option|Unable|Import)", line)
    ]
    depths = [len(line) - len(line.lstrip(" -")) for line in lines]
    reasons = [line.strip(" -") for line, depth in zip(lines, depths, strict=True) if depth == max(depths)]
    reasons = [r for r in reasons if "NoneType" not in r] or [message.split(":", 1)[1]]
    given = re.findall(r"Given value: (.+)", message)
    if given and given[0] not in reasons[-1] and "NestedArg" not in given[0]:
        reasons.append(f"got {given[0]}")
    return re.sub(r"<class '([\w.]+)'>", r"\1", f"{key}: {'; '.join(reasons)}")


def refused(error: BaseException) -> str | None:
    """One line for an error that bad input explains; None for any other.

    Explained are ``InputError``, also where a library has wrapped it; what Lightning and the parser say of a
    setting, a ``MisconfigurationException`` or one of ``REFUSALS`` that their own code raised; and one of
    ``REFUSALS`` of a class that the parser was making.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__ or cause.__context__
    first = root(error)
    theirs = raised_in(error).startswith(("lightning.", "jsonargparse."))
    if cause is None and (
        isinstance(first, MisconfigurationException) or (theirs and isinstance(first, REFUSALS))
    ):
        cause = first
    if cause is None:
        return None
    line = " ".join(str(cause).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def root(error: BaseException) -> BaseException:
    """The first error in the chain of causes of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def raised_in(error: BaseException) -> str:
    """The module whose line raised an error; of an attribute that is missing, the one that asked for it."""
    trace: Any = error.__traceback__
    while trace and trace.tb_next and trace.tb_next.tb_frame.f_code.co_name != "__getattr__":
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")) if trace else ""
